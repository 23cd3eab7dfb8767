"""For tests: small data sets in folders, and the real ones where a variable says they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coded_resnext.data.datasets import DATA_VARIABLE

REAL_DATA = Path(os.environ.get(DATA_VARIABLE, "no-data"))
needs_cifar10 = pytest.mark.skipif(
    not ((REAL_DATA / "cifar10.npz").exists() or (REAL_DATA / "cifar10").is_dir()),
    reason=f"{DATA_VARIABLE} names no folder with cifar10",
)
needs_photographs = pytest.mark.skipif(
    not (REAL_DATA / "imagenet-sample").is_dir(),
    reason=f"{DATA_VARIABLE} names no folder with imagenet-sample",
)


def write_images(
    root: Path, counts: Mapping[str, int], *, size: int = 12, seed: int = 0, contrast: float = 120
) -> None:
    """`ROOT/CLASS/00000.png ..`: noise with a bright band; place and colour are the class's."""
    generator = np.random.default_rng(seed)
    for index, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        # Red, green, yellow, blue, ..
        colour = np.array([(index + 1) >> channel & 1 for channel in range(3)])
        band = slice(index * size // len(counts), (index + 1) * size // len(counts))
        for number in range(count):
            pixels = generator.uniform(0, 100, (size, size, 3))
            pixels[band] += contrast * colour
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:05d}.png")
