"""What a training loader gives, and one over tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .data import derive_seed


class Batch(NamedTuple):
    """The samples of one optimizer step on one process."""

    images: Tensor
    """`[B, C, H, W]`."""
    targets: Tensor
    """Class indices `[B]`."""
    indices: Tensor
    """Positions `[B]` of the samples in their data set, int64."""


class TrainLoader(Protocol):
    """Training batches that follow from (seed, epoch, step, process) and from nothing else."""

    def __len__(self) -> int:
        """Optimizer steps of an epoch, the same number on every process."""

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next pass yields.

        Args:
            epoch: counted from 1.
            start_step: the first step to yield. The batches are bit for bit those that a whole
                pass yields from this step on.
        """

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process, `len(self) - start_step` of them."""

    def describe(self, indices: Tensor) -> list[str]:
        """How a person finds the samples of a batch: their files, say."""


class BatchAugment(Protocol):
    """Changes the images of a batch, each by numbers of its own."""

    draws: int
    """How many numbers an image needs."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """`[B, C, H, W]` and uniform numbers `[B, draws]` in [0, 1) to images of the same shape."""


class TrainingBatches:
    """A training loader over tensors in memory.

    The order follows from (seed, epoch), what an image's augmentation draws from
    (seed, epoch, image): neither depends on the number of processes. All batches are full; the
    images that are left over in one epoch come in another.

    Args:
        images: `[n, C, H, W]`.
        targets: class indices `[n]`.
        batch_size: images of an optimizer step, over all processes.
        seed: of order and augmentation.
        augment: applied to the images of every batch.
        rank: this process, counted from 0.
        world_size: how many processes share a batch.

    Raises:
        ValueError: lengths that differ, fewer samples than a batch, or a batch that the processes
            do not divide.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int,
        augment: BatchAugment | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(images) != len(targets):
            raise ValueError(
                f"images: expected as many as targets, got {len(images)} images and "
                f"{len(targets)} targets"
            )
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"batch_size: expected 1 to {len(images)} (the samples there are), got {batch_size}"
            )
        if batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of {world_size} processes, got {batch_size}"
            )
        self.images, self.targets, self.batch_size = images, targets, batch_size
        self.seed, self.augment, self.rank, self.world_size = seed, augment, rank, world_size
        self.epoch, self.start_step = 1, 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose order and draws of the next pass, and its first step."""
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.images), generator=generator)
        augment, draws = self.augment, torch.empty(0)
        if augment is not None:
            draws = torch.rand(len(self.images), augment.draws, generator=generator)
        for step in range(self.start_step, len(self)):
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            chosen = whole[self.rank :: self.world_size]
            images = self.images[chosen]
            if augment is not None:
                images = augment(images, draws[chosen])
            yield Batch(images, self.targets[chosen], chosen)

    def describe(self, indices: Tensor) -> list[str]:
        """Samples in memory have no name but their position."""
        return [f"sample {index}" for index in indices.tolist()]
