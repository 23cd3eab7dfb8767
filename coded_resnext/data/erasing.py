"""Random erasing of whole batches on a device, in the rectangles that timm draws on the host."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .augment import Augmentation

# Numbers of a rectangle: top, left, bottom, right, and its colour.
RECTANGLE = 7
# Noise is cut out of a fixed field of this many pixels squared, at a place drawn for each image.
NOISE_SIDE = 1024


class Rectangles:
    """Draws what is erased from an image: as numbers what timm's `RandomErasing` does to it.

    Args:
        augmentation: with `reprob`, `remode` and `recount`.

    Attributes:
        columns: numbers of an image.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.columns = augmentation.recount * RECTANGLE + 2 if augmentation.reprob else 0
        self._is_coloured = augmentation.remode == "rand"
        if self.columns:
            from timm.data.random_erasing import RandomErasing

            make: Any = RandomErasing
            # Noise is not drawn here: it would be as much as the images.
            mode = "rand" if self._is_coloured else "const"
            self._timm = make(
                augmentation.reprob, mode=mode, max_count=augmentation.recount, device="cpu"
            )

    def draw(self, side: int, seed: int) -> list[float]:
        """Returns the numbers `[columns]` of an image `side` pixels square, from its seed."""
        random.seed(seed)
        if self._is_coloured:
            torch.default_generator.manual_seed(seed)
        notes = _Notes(side)
        self._timm(notes)
        numbers = notes.numbers + [0.0] * (self.columns - 2 - len(notes.numbers))
        return numbers + [float(random.randrange(NOISE_SIDE)) for _ in range(2)]  # noqa: S311


class _Notes:
    """Stands for an image; writes down what is put into it."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self.numbers: list[float] = []
        self._shape = (3, side, side)

    def size(self) -> tuple[int, int, int]:
        return self._shape

    def __setitem__(self, place: tuple[slice, slice, slice], colour: Tensor) -> None:
        _, rows, columns = place
        edges = (rows.start, columns.start, rows.stop, columns.stop)
        self.numbers += [*map(float, edges), *colour.flatten().tolist()]


class DeviceErasing:
    """Erases rectangles from a batch; the host does not wait.

    Noise is standard normal as timm's, but other numbers: a window of a fixed field of three
    million, the same on all devices.

    Args:
        augmentation: with `remode`.
        columns: of `Rectangles`.
        device: where the images are.
    """

    def __init__(self, augmentation: Augmentation, columns: int, device: torch.device) -> None:
        self.columns = columns
        self._noise: Tensor | None = None
        if columns and augmentation.remode == "pixel":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(3, NOISE_SIDE, NOISE_SIDE, generator=generator)
            self._noise = noise.to(device)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """`[B, 3, H, W]`, normalised, and `[B, columns]`, float64, to images of the same shape."""
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        noise = None
        if self._noise is not None:
            down, across = numbers[:, -2:].long()[:, :, None, None].unbind(1)
            window = self._noise[:, (down + rows) % NOISE_SIDE, (across + columns) % NOISE_SIDE]
            noise = window.transpose(0, 1)
        for start in range(0, self.columns - 2, RECTANGLE):
            edges = numbers[:, start : start + 4, None, None]
            top, left, bottom, right = edges.unbind(1)
            inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
            colour = numbers[:, start + 4 : start + RECTANGLE, None, None].to(images.dtype)
            images = torch.where(inside[:, None], colour if noise is None else noise, images)
        return images
