"""Eleven kinds of image file that something could trip over, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# Linux's speed of the loop-back device, which has none.
FAILING = Path("/sys/class/net/lo/speed")
# Left half dark, right half bright, upper row brighter: a turned picture is another one.
GREY = np.array([[60, 220], [20, 180]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)


@dataclass(frozen=True)
class BadImage:
    """A kind of file."""

    name: str
    """Of the file."""
    make: Callable[[Path], None]
    noticed: str
    """When it is noticed: "read" (it is an image), "start" (of a training), or "met"."""
    intensity: Callable[[], np.ndarray] | None = None
    """What the network is to see, `[16, 16]` of 0..255; None where the file is refused."""


def _grey() -> np.ndarray:
    return GREY.astype(float)


def _save(**options: object) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(GREY).save(path, **options)


def _truncated(path: Path) -> None:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:2000])


def _bomb(path: Path) -> None:
    """A header of four hundred million pixels, in some hundred bytes."""
    buffer = BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(content))


def _cmyk(path: Path) -> None:
    ink = 255 - GREY
    zero = np.zeros_like(ink)
    Image.fromarray(np.stack([zero, zero, zero, ink], 2), "CMYK").save(path, quality=95)


def _deep(path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)


def _animated(path: Path) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _alpha(path: Path) -> None:
    clear = np.zeros_like(GREY)
    Image.fromarray(np.stack([GREY, GREY, GREY, clear], 2), "RGBA").save(path)


def _turned(path: Path) -> None:
    """Stored on its side; the tag says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(GREY)).save(path, exif=exif)


def _unreadable(path: Path) -> None:
    """A file of 4096 bytes of which none can be read, not by an administrator either."""
    path.symlink_to(FAILING)


BAD_IMAGES = (
    BadImage("truncated.png", _truncated, "met"),
    BadImage("zero.png", lambda path: path.write_bytes(b""), "start"),
    BadImage("bomb.png", _bomb, "met"),
    BadImage("cmyk.jpg", _cmyk, "read", _grey),
    BadImage("sixteen.png", _deep, "read", _grey),
    BadImage("animated.gif", _animated, "read", _grey),
    BadImage("alpha.png", _alpha, "read", _grey),
    BadImage("turned.jpg", _turned, "read", _grey),
    BadImage("wrong.jpg", _save(format="PNG"), "read", _grey),
    BadImage("dangling.png", lambda path: path.symlink_to("nowhere.png"), "start"),
    BadImage("unreadable.png", _unreadable, "met"),
)
