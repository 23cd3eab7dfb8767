"""Images on their way into a network: preprocessing, and the digits that ship with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pixels import to_channels

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a network's input in pixels: no description of unknown origin asks for more memory.
LARGEST_SIZE = 8192
SPLIT_SEED = 0
TEST_SHARE = 0.2


def derive_seed(*parts: int) -> int:
    """One seed from several non-negative numbers, such as (seed, epoch)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input: resizing, crop, channels and normalisation."""

    size: int
    """Height and width of the input in pixels."""
    channels: int
    """1 for grey, 3 for RGB."""
    mean: tuple[float, ...]
    """Mean of every channel of intensities in 0..1, subtracted."""
    std: tuple[float, ...]
    """Standard deviation of every channel, divided by."""
    resize: int | None = None
    """What the shorter side is resized to before the centre is cut out; None means `size`."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected a positive number of pixels, got {self.size}")
        largest = max(self.size, self.resize or 0)
        if largest > LARGEST_SIZE:
            raise ValueError(f"size: expected at most {LARGEST_SIZE} pixels, got {largest}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"resize: expected at least the size, {self.size} pixels, got {self.resize}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name}: expected {self.channels} numbers, got {len(values)}")
            if not all(isinstance(value, (int, float)) and isfinite(value) for value in values):
                raise ValueError(f"{name}: expected finite numbers, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers, got {self.std}")

    def normalize(self, images: Tensor) -> Tensor:
        """Intensities in 0..1, `[.., C, H, W]`, to the network's input."""
        mean = images.new_tensor(self.mean)[:, None, None]
        std = images.new_tensor(self.std)[:, None, None]
        return (images - mean) / std

    def __call__(self, image: Image) -> Tensor:
        """A PIL image of any mode and size to `[C, size, size]`, float32; bicubic resizing.

        `pixels.to_channels` says what becomes of orientation, bit depth and colour space.
        """
        image = resize_and_cut(to_channels(image, self.channels), self.size, self.resize)
        return self.normalize(intensities(image))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote."""
        return cls(
            data["size"],
            data["channels"],
            tuple(data["mean"]),
            tuple(data["std"]),
            data.get("resize"),
        )


def resize_and_cut(image: Image, size: int, resize: int | None = None) -> Image:
    """The centre of an image, `size` pixels square, its shorter side first resized (bicubic).

    Args:
        image: any size.
        size: height and width of the result.
        resize: what the shorter side is resized to; None means `size`.
    """
    width, height = image.size
    shorter = resize or size
    scale = shorter / min(width, height)
    new_size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    if new_size != image.size:
        image = image.resize(new_size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def intensities(image: Image) -> Tensor:
    """An 8-bit grey or RGB image as `[C, H, W]`, float32 in 0..1."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class RandomShift:
    """Moves every image by up to `pixels` in each direction; what enters repeats the border.

    Args:
        pixels: largest shift, at least 0.
    """

    draws = 2

    def __init__(self, pixels: int) -> None:
        if pixels < 0:
            raise ValueError(f"pixels: expected at least 0, got {pixels}")
        self.pixels = pixels

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape, shifted by uniform numbers `[B, 2]` in [0, 1)."""
        batch, _, height, width = images.shape
        padded = F.pad(images, (self.pixels,) * 4, mode="replicate")
        shifts = (draws * (2 * self.pixels + 1)).long()
        rows = shifts[:, :1] + torch.arange(height)
        columns = shifts[:, 1:] + torch.arange(width)
        samples = torch.arange(batch)[:, None, None]
        return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Batches:
    """Tensors in memory, in their order, for evaluation: batches `(images, targets)`.

    Args:
        images: `[n, C, H, W]`.
        targets: class indices `[n]`.
        batch_size: samples in a batch; the last may be smaller.
        rank: this process, counted from 0.
        world_size: how many processes share the samples; each sample is with one of them.

    Raises:
        ValueError: no samples, lengths that differ, or a batch size below 1.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(images) != len(targets) or len(images) == 0:
            raise ValueError(
                f"images: expected as many as targets and at least one, got {len(images)} images "
                f"and {len(targets)} targets"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.images, self.targets = images[rank::world_size], targets[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self.images[chosen], self.targets[chosen]


def batches(images: Tensor, targets: Tensor, batch_size: int = 256) -> Batches:
    """All samples in their order, for evaluation."""
    return Batches(images, targets, batch_size)


@dataclass(frozen=True)
class DigitsSplit:
    """scikit-learn's 1,797 handwritten digits, normalised and split; 8x8 pixels, 10 classes."""

    train_images: Tensor
    """`[1437, 1, 8, 8]`, float32."""
    train_targets: Tensor
    test_images: Tensor
    """`[360, 1, 8, 8]`, float32."""
    test_targets: Tensor
    train_indices: Tensor
    """Positions of the training images in the data set as scikit-learn returns it."""
    test_indices: Tensor
    preprocessing: Preprocessing


def load_digits_split(seed: int = SPLIT_SEED) -> DigitsSplit:
    """The digits in a stratified 80/20 split; mean and deviation are those of the training images.

    The set is ordered by writer, so that a sequential split would be another task: new writers.

    Raises:
        ImportError: scikit-learn is missing; the message names the extra that has it.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'coded-resnext[train]'"
        ) from error
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=TEST_SHARE,
        random_state=seed,
        stratify=digits.target,
    )
    # Sixteen grey levels, 0..16.
    intensities = torch.from_numpy(digits.images).float()[:, None] / 16
    targets = torch.from_numpy(digits.target).long()
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    preprocessing = Preprocessing(
        size=8,
        channels=1,
        mean=(float(intensities[train].mean()),),
        std=(float(intensities[train].std()),),
    )
    images = preprocessing.normalize(intensities)
    return DigitsSplit(
        images[train], targets[train], images[test], targets[test], train, test, preprocessing
    )
