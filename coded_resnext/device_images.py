"""Loaders of images that stay in the memory of the network's device, augmented there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augmentation
from .batch import Batch, Key, ShuffledSamples
from .data import Preprocessing, derive_seed
from .device_augment import DeviceAugment, Draws, Normalize
from .image_sets import DamagedImages, ImageSet, MemoryImages
from .loaders import Plan, make_loader, passing

Augment = Callable[[Tensor, Tensor, Tensor], Tensor]


def device_pixels(images: ImageSet, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """All images of a set in a device's memory, `[n, 3, size, size]`, uint8.

    Raises:
        ValueError: the images are not decoded in memory, or not of the network's size; resizing is
            left to the CPU.
    """
    size = preprocessing.size
    wanted = f"augment_on: expected decoded images of {size} x {size} pixels for the device"
    if not isinstance(images, MemoryImages):
        raise ValueError(f"{wanted}, got files; decode them with storage memory")
    pixels = images.pixels
    if tuple(pixels.shape[2:]) != (size, size) or preprocessing.resize not in (None, size):
        height, width = pixels.shape[2:]
        raise ValueError(
            f"{wanted}, neither resized nor cut, got {height} x {width} and a resizing to "
            f"{preprocessing.resize or size}; leave it to augment_on cpu"
        )
    return pixels.contiguous().to(device)


class DeviceTrainImages(ShuffledSamples):
    """A training loader as `loaders.TrainImages` with the same order and draws, on the device.

    A step sends the places of its images and a few numbers for each to the device, and never waits
    for it.

    Args:
        images: the training images, decoded, of the network's size.
        augmentation: what happens to them.
        preprocessing: size and normalisation.
        batch_size: images of an optimizer step, over all ranks.
        device: of the network.
        seed: of order and augmentation.
        rank: this process, counted from 0.
        world_size: how many processes share a batch.
        workers: processes that make the draws for this rank; 0 makes them in this one.
        around: put around what the device does, such as `torch.compile`.

    Raises:
        ValueError: the device cannot do what is asked for, see `Draws` and `device_pixels`; or as
            `ShuffledSamples`.
        ImportError: timm or Pillow is missing.
    """

    def __init__(
        self,
        images: ImageSet,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        around: Callable[[Augment], Augment] | None = None,
    ) -> None:
        super().__init__(len(images), batch_size, seed=seed, rank=rank, world_size=world_size)
        draws = Draws(augmentation, preprocessing)
        augment: Augment = DeviceAugment(preprocessing, draws.fill, device)
        self._augment = around(augment) if around else augment
        self.images, self._pixels = images, device_pixels(images, preprocessing, device)
        self.damaged = DamagedImages(len(images), 0)
        """None: decoding has left them out."""
        drawing = _Drawing(draws, images.targets, seed)
        self._loader = make_loader(drawing, Plan(self.keys), workers)

    def __iter__(self) -> Iterator[Batch]:
        device = self._pixels.device
        for drawn in passing(self._loader):
            indices, draws = (
                each.to(device, non_blocking=True) for each in (drawn.indices, drawn.draws)
            )
            pixels = self._augment(self._pixels, indices, draws)
            yield Batch(pixels, drawn.targets, drawn.indices)

    def describe(self, indices: Tensor) -> list[str]:
        """The files of samples."""
        return [self.images.name(index) for index in indices.tolist()]


class DeviceEvalImages:
    """An evaluation loader as `loaders.EvalImages`, of images in the device's memory.

    Args:
        images: decoded, of the network's size.
        preprocessing: size and normalisation.
        batch_size: images in a batch of this rank; the last may be smaller.
        device: of the network.
        rank: this process, counted from 0.
        world_size: how many processes share the images.

    Raises:
        ValueError: see `device_pixels`.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._pixels = device_pixels(images, preprocessing, device)[rank::world_size]
        self._targets = images.targets[rank::world_size]
        self._normalize = Normalize(preprocessing, device)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._pixels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._pixels), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self._normalize(self._pixels[chosen]), self._targets[chosen]


class _Drawn(NamedTuple):
    """What the host decides about a batch; of a named tuple PyTorch pins the tensors."""

    draws: Tensor
    targets: Tensor
    indices: Tensor


class _Drawing(Dataset[_Drawn]):
    """Makes the draws of whole batches."""

    def __init__(self, draws: Draws, targets: Tensor, seed: int) -> None:
        self.draws, self.targets, self.seed = draws, targets, seed

    def __getitem__(self, key: Key) -> _Drawn:
        epoch, positions = key
        seeds = [derive_seed(self.seed, epoch, position) for position in positions]
        chosen = torch.tensor(positions)
        return _Drawn(self.draws(seeds), self.targets[chosen], chosen)
