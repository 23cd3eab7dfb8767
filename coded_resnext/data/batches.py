"""What a training loader gives, and one over tensors in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .preprocessing import derive_seed

# Epoch, and positions of a batch, see `ShuffledSamples.chosen`.
Key = tuple[int, list[int]]


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
        """Returns the optimizer steps of an epoch, as many on every process."""

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Chooses what the next pass yields.

        Args:
            epoch: counted from 1.
            start_step: the first step to yield. The batches are bit for bit those that a whole
                pass yields from this step on.
        """

    def __iter__(self) -> Iterator[Batch]:
        """Returns the batches of this process, `len(self) - start_step` of them."""

    def describe(self, indices: Tensor) -> list[str]:
        """Tells a person how to find the samples of a batch: their files, say."""


class BatchAugment(Protocol):
    """Changes the images of a batch, each by numbers of its own."""

    draws: int
    """Number of random numbers that an image needs."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Returns images like `[B, C, H, W]`, by uniform numbers `[B, draws]` in [0, 1)."""


class ShuffledSamples:
    """The order of training samples, anew in every epoch and shared by the processes.

    Batches are full: samples left over in one epoch come in another.

    Args:
        targets: class indices `[n]` of the samples.
        batch_size: samples of an optimizer step, over all processes.
        seed: of the order.
        rank: this process, counted from 0.
        world_size: how many processes share a batch.
        balanced: draw samples with replacement, each class as often as any other, as
            `WeightedRandomSampler` does with the inverse of the classes' sizes.

    Raises:
        ValueError: fewer samples than a batch, or a batch that the processes do not divide.
    """

    def __init__(
        self,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        balanced: bool = False,
    ) -> None:
        samples = len(targets)
        if not 1 <= batch_size <= samples:
            raise ValueError(
                f"batch_size: expected 1 to {samples} (the samples there are), got {batch_size}"
            )
        if batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of {world_size} processes, got {batch_size}"
            )
        self.targets, self.balanced = targets, balanced
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start_step = 1, 0

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Chooses order and draws of the next pass, and its first step."""
        self.epoch, self.start_step = epoch, start_step

    def fingerprint(self) -> dict[str, Any]:
        """Returns the number of images, and where it can a digest of which they are; JSON-ready."""
        return {"images": self.samples}

    def generator(self) -> torch.Generator:
        """Returns the epoch's generator, the same on all processes; the order is its first draw."""
        return torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))

    def chosen(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Places `[B]` of this process's samples, step by step; the order is drawn at once.

        The position is that modulo the number of samples. What comes again in an epoch, as in a
        balanced order, has another position, so that it is augmented otherwise.
        """
        order = torch.randperm(self.samples, generator=generator)
        if self.balanced:
            weights = 1 / torch.bincount(self.targets)[self.targets].double()
            order = torch.multinomial(weights, self.samples, replacement=True, generator=generator)
            ascending, where = order.sort(stable=True)
            before = torch.arange(self.samples) - torch.searchsorted(ascending, ascending)
            order[where] += self.samples * before
        return (
            order[step * self.batch_size : (step + 1) * self.batch_size][
                self.rank :: self.world_size
            ]
            for step in range(self.start_step, len(self))
        )

    def keys(self) -> Iterator[Key]:
        """Yields what makes this process's batches where nothing else is drawn in their order."""
        for positions in self.chosen(self.generator()):
            yield self.epoch, positions.tolist()


class TrainingBatches(ShuffledSamples):
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
        super().__init__(targets, batch_size, seed=seed, rank=rank, world_size=world_size)
        self.images, self.augment = images, augment

    def __iter__(self) -> Iterator[Batch]:
        generator = self.generator()
        steps = self.chosen(generator)
        augment, draws = self.augment, torch.empty(0)
        if augment is not None:
            draws = torch.rand(len(self.images), augment.draws, generator=generator)
        for chosen in steps:
            images = self.images[chosen]
            if augment is not None:
                images = augment(images, draws[chosen])
            yield Batch(images, self.targets[chosen], chosen)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the number of images, and a digest of their bytes and classes; JSON-ready."""
        return _content(self.images, self.targets)

    def describe(self, indices: Tensor) -> list[str]:
        """Samples in memory have no name but their position."""
        return [f"sample {index}" for index in indices.tolist()]


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
        """Returns `[B, C, H, W]` shifted by uniform numbers `[B, 2]` in [0, 1)."""
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
        self.batch_size, self._whole = batch_size, (images, targets)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self.images[chosen], self.targets[chosen]

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of all samples, on every rank."""
        return _content(*self._whole)


def _content(images: Tensor, targets: Tensor) -> dict[str, Any]:
    content = hashlib.sha256()
    for tensor in (images, targets):
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {"images": len(images), "content": content.hexdigest()[:16]}


def batches(images: Tensor, targets: Tensor, batch_size: int = 256) -> Batches:
    """Returns all samples in their order, for evaluation."""
    return Batches(images, targets, batch_size)


def full_batches(
    parts: Iterable[tuple[Tensor, ...]], batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Joins and cuts batches, so that all but the last have the same number of samples.

    Args:
        parts: tensors `[B, ..]` in tuples, B as it comes.
        batch_size: samples of a batch.
    """
    waiting: list[tuple[Tensor, ...]] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part[0])
        while count >= batch_size:
            joined = _joined(waiting)
            yield tuple(tensor[:batch_size] for tensor in joined)
            count -= batch_size
            waiting = [tuple(tensor[batch_size:] for tensor in joined)] if count else []
    if count:
        yield _joined(waiting)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
