"""Loaders of images for training and evaluation, on one process or many.

What a sample becomes follows from (seed, epoch, sample) alone: not from the number of worker
processes or ranks, nor from where a run was resumed.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import TrainTransform
from .batches import Batch, Key, ShuffledSamples
from .image_sets import DamagedImages, ImageSet
from .preprocessing import Preprocessing, derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

# The signals that end a run: its main process answers them, not those that read.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_Transform = Callable[[Sequence["Image"], Sequence[int]], Tensor]


class _Read(NamedTuple):
    """What a process that reads hands back; of a named tuple PyTorch pins the tensors."""

    batch: Batch | None
    """The batch; None when reading it failed."""
    damaged: dict[str, str]
    """Reason why each unreadable image could not be read, by the image's name."""
    failure: str


class _Reader(Dataset[_Read]):
    """Makes whole batches.

    Args:
        images: the images.
        transform: from images and their seeds to `[B, 3, H, W]`.
        seed: the seeds follow from it, the epoch and the position.
        most_damaged: how many unreadable images one place in a batch may meet before it is a
            failure.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: _Transform,
        seed: int,
        most_damaged: int,
    ) -> None:
        self.images, self.transform = images, transform
        self.seed, self.most_damaged = seed, most_damaged

    def __getitem__(self, key: Key) -> _Read:
        epoch, positions = key
        damaged: dict[str, str] = {}
        found, indices = [], []
        for position in positions:
            image = None
            # The next image takes the place of a damaged one, so that every batch stays full.
            for offset in range(self.most_damaged + 1):
                index = (position + offset) % len(self.images)
                try:
                    image = self.images.image(index)
                    break
                except ValueError as error:
                    damaged[self.images.name(index)] = str(error)
            if image is None:
                return _Read(None, damaged, next(reversed(damaged.values())))
            found.append(image)
            indices.append(index)
        seeds = [derive_seed(self.seed, epoch, index) for index in indices]
        pixels, chosen = self.transform(found, seeds), torch.tensor(indices)
        return _Read(Batch(pixels, self.images.targets[chosen], chosen), damaged, "")


class TrainImages(ShuffledSamples):
    """A training loader: augmented, shuffled, full batches, and their files by name.

    Damaged images are skipped: the next image in the set takes the place, so that the batches of
    all ranks stay full. They are counted, named on stderr, and too many of them are an error.

    Args:
        images: the training images.
        transform: the augmentation.
        batch_size: images of an optimizer step, over all ranks.
        seed: of order and augmentation.
        rank: this process, counted from 0.
        world_size: how many processes share a batch.
        workers: processes that read images for this rank; 0 reads in this one.
        max_damaged: largest share of the images that may be damaged.

    Raises:
        ValueError: fewer images than a batch, a batch that the ranks do not divide, or a number
            outside its range; while iterating, too many damaged images.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: TrainTransform,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_damaged: float = 0.01,
    ) -> None:
        super().__init__(len(images), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.images = images
        self.damaged = DamagedImages(len(images), max_damaged)
        """The images that could not be read so far, by this rank."""
        reader = _Reader(images, transform, seed, self.damaged.limit)
        self._loader = make_loader(reader, Plan(self.keys), workers)

    def __iter__(self) -> Iterator[Batch]:
        for read in passing(self._loader):
            for name, reason in read.damaged.items():
                self.damaged.add(name, reason)
            yield _batch(read)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the number of images, and a digest of their names and classes.

        Of a path the class's folder and the file count, since a data set may be moved.
        """
        digest = hashlib.sha256()
        for index, target in enumerate(self.images.targets.tolist()):
            name = "/".join(Path(self.images.name(index)).parts[-2:])
            digest.update(f"{target} {name}\n".encode(errors="surrogateescape"))
        return {"images": len(self.images), "names": digest.hexdigest()}

    def describe(self, indices: Tensor) -> list[str]:
        """Returns the files of samples."""
        return [self.images.name(index) for index in indices.tolist()]


class EvalImages:
    """An evaluation loader: pairs `(images [B, 3, H, W], targets [B])`, in the order of the set.

    Every rank has samples of its own, each exactly once; no sample is repeated to fill a batch. An
    image that cannot be read is an error.

    Args:
        images: the images.
        preprocessing: from an image to a network's input.
        batch_size: images in a batch of this rank; the last may be smaller.
        rank: this process, counted from 0.
        world_size: how many processes share the images.
        workers: processes that read images for this rank; 0 reads in this one.

    Raises:
        ValueError: no images, or a number outside its range; while iterating, an unreadable image.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        batch_size: int = 256,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if len(images) == 0:
            raise ValueError("images: expected at least one to evaluate on, got none")
        self.images, self.batch_size = images, batch_size
        self._mine = range(rank, len(images), world_size)
        reader = _Reader(images, _Plain(preprocessing), 0, 0)
        self._loader = make_loader(reader, Plan(self._keys), workers)

    def __len__(self) -> int:
        return -(-len(self._mine) // self.batch_size)

    def _keys(self) -> Iterator[Key]:
        for start in range(0, len(self._mine), self.batch_size):
            yield 0, list(self._mine[start : start + self.batch_size])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for read in passing(self._loader):
            batch = _batch(read)
            yield batch.images, batch.targets


class _Plain:
    """The transform of an evaluation: no draws."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, images: Sequence[Image], _: Sequence[int]) -> Tensor:
        return torch.stack([self.preprocessing(image) for image in images])


class Plan(Sampler[Key]):
    """What to read in the next pass, asked for when it begins."""

    def __init__(self, keys: Callable[[], Iterator[Key]]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[Key]:
        return self._keys()


def make_loader(reader: Dataset[Any], plan: Plan, workers: int) -> DataLoader[Any]:
    """Reads what a plan asks for, batch by batch, in worker processes or (0) in this one."""
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    return DataLoader(
        reader,
        batch_size=None,  # the reader makes whole batches
        sampler=plan,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        # Of its own: otherwise every pass draws from PyTorch's default generator.
        generator=torch.Generator().manual_seed(0),
    )


def passing(loader: DataLoader[Any]) -> Iterator[Any]:
    """One pass; its workers end with it, however it ends.

    Workers that live until the interpreter exits would be sent a signal that they ignore.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as error:
        # Without its traceback, which would hold the iterator, and so the other workers.
        raise OSError(f"a process that reads images has failed: {error}") from None
    finally:
        del iterator


def _batch(read: _Read) -> Batch:
    """Returns the batch, or the reason why there is none, in the process that asked for it."""
    if read.batch is None:
        raise ValueError(read.failure)
    return read.batch


def ignore_signals(worker: int = 0) -> None:
    """Makes a data loader's worker survive a signal to the whole process group.

    The training process needs it for the step that it finishes. For `DataLoader(worker_init_fn=)`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
