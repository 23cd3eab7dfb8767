"""Image files with random faults, in every format that is read: an image, or a sentence."""

from __future__ import annotations

import random
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from coded_resnext.data.image_folder import FORMATS, open_image
from coded_resnext.data.preprocessing import Preprocessing

SIZE = (37, 23)
NETWORK_SIZE = 16


@dataclass
class Outcomes:
    """What became of the files."""

    tried: Counter[str] = field(default_factory=Counter)
    """Number of files of each format."""
    read: int = 0
    refused: int = 0
    escaped: list[str] = field(default_factory=list)
    """Format, seed and error of files at which something else than the sentence came out."""
    slowest: float = 0.0
    """Seconds."""

    def __str__(self) -> str:
        return (
            f"{len(self.tried)} formats, {self.read} read, {self.refused} refused by name, "
            f"slowest {self.slowest:.1f} s"
        )


def whole_files() -> dict[str, list[bytes]]:
    """Good files by format, in several modes, with and without EXIF."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (*SIZE[::-1], 4), dtype=np.uint8)
    colour = Image.fromarray(noise[..., :3].copy())
    pictures: list[Image.Image] = [
        *(colour, Image.fromarray(noise), colour.convert("L"), colour.convert("P")),
        *(colour.convert("1"), colour.convert("CMYK")),
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257),
    ]
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, 72.0, "a description"
    files: dict[str, list[bytes]] = {}
    for name in FORMATS:
        for picture in pictures:
            for settings in ({}, {"exif": exif}, {"compression": "tiff_lzw"}):
                try:
                    buffer = BytesIO()
                    picture.save(buffer, name, **settings)
                except Exception:  # noqa: S112 - a format that is not written, or not in this mode
                    continue
                if buffer.getvalue() not in files.setdefault(name, []):
                    files[name].append(buffer.getvalue())
    return {name: contents for name, contents in files.items() if contents}


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to four faults: bits, bytes, numbers, a cut, a part twice or left out."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        # Headers are where a fault does most.
        end = len(data) if draw.random() < 0.5 else min(len(data), 120)
        place = draw.randrange(max(end, 1))
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[place] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            number = draw.choice((0, 1, 255, 65535, 2**31 - 1, 2**32 - 1, draw.randrange(2**32)))
            data[place : place + 4] = struct.pack(draw.choice("<>") + "L", number)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            data[place:place] = data[place : place + draw.randint(1, 40)]
        else:
            del data[place : place + draw.randint(1, 40)]
    return bytes(data)


def mutate_images(folder: Path, *, files: int, seed: int) -> Outcomes:
    """Open mutated files as a network's input.

    Args:
        folder: for the files.
        files: how many, the same number of each format.
        seed: of the faults.
    """
    outcomes = Outcomes()
    wholes = whole_files()
    preprocess: list[Callable[[Image.Image], object]] = [
        Preprocessing(NETWORK_SIZE, channels, (0.5,) * channels, (0.25,) * channels)
        for channels in (1, 3)
    ]
    path = folder / "mutated.png"
    for index in range(files):
        draw = random.Random(seed + index)  # noqa: S311
        name = list(wholes)[index % len(wholes)]
        path.write_bytes(mutate(draw.choice(wholes[name]), draw))
        outcomes.tried[name] += 1
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                channels = draw.choice((1, 3))
                preprocess[channels == 3](open_image(path, channels))
            outcomes.read += 1
        except ValueError as error:
            if ": not a readable image: " in str(error):
                outcomes.refused += 1
            else:
                outcomes.escaped.append(f"{name}, seed {seed + index}: {error!r}")
        except Exception as error:
            outcomes.escaped.append(f"{name}, seed {seed + index}: {error!r}")
        outcomes.slowest = max(outcomes.slowest, time.perf_counter() - begun)
    return outcomes
