"""Loaders of images for training and evaluation, on one process or many.

What a sample becomes follows from (seed, epoch, sample) alone: not from the number of worker
processes or ranks, nor from where a run was resumed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import generators_kept
from .batches import Batch, Key, ShuffledSamples, TrainLoader, full_batches
from .image_sets import MAX_DAMAGED, DamagedImages, ImageSet, attempt
from .preprocessing import Preprocessing, derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

# The signals that end a run: its main process answers them, not those that read.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Transform(Protocol):
    """From images of a set to a batch."""

    def open(self, images: ImageSet, indices: Sequence[int], seeds: Sequence[int], /) -> list[Any]:
        """Reads images; a ValueError stands for one that cannot be read, and names it."""

    def __call__(
        self, opened: Sequence[Any], seeds: Sequence[int], /
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns `[B, 3, H, W]` of what was opened, and perhaps draws for the device."""


class Read(NamedTuple):
    """What a process that reads hands back; of a named tuple PyTorch pins the tensors."""

    batch: Batch | None
    """The images that could be read; None when there is none."""
    damaged: dict[int, str]
    """Reason why each unreadable image could not be read, by the image's index in the set."""
    draws: Tensor | None = None
    """What is still to be done to the images, on the device."""


class _Reader(Dataset[Read]):
    """Makes whole batches.

    Args:
        images: the images.
        transform: makes a batch of images and their seeds.
        seed: the seeds follow from it, the epoch and the position.
        replacements: how many of the images that follow may be tried instead of a damaged one.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        seed: int,
        replacements: int,
    ) -> None:
        self.images, self.transform = images, transform
        self.seed, self.replacements = seed, replacements

    def __getitem__(self, key: Key) -> Read:
        with generators_kept():
            return self._read(*key)

    def _read(self, epoch: int, positions: list[int]) -> Read:
        damaged: dict[int, str] = {}
        count, opened = len(self.images), {}
        left = dict(enumerate(positions))
        for offset in range(self.replacements + 1):
            turns = [divmod(position, count) for position in left.values()]
            indices = [(first + offset) % count for _, first in turns]
            seeds = [
                derive_seed(self.seed, epoch, index + again * count)
                for index, (again, _) in zip(indices, turns, strict=True)
            ]
            results = self.transform.open(self.images, indices, seeds)
            for slot, index, seed, result in zip([*left], indices, seeds, results, strict=True):
                if isinstance(result, ValueError):
                    damaged[index] = str(result)
                else:
                    opened[slot] = index, seed, result
                    del left[slot]
            if not left:
                break
        if not opened:
            return Read(None, damaged)
        in_order = [opened[slot] for slot in sorted(opened)]
        indices, seeds, results = map(list, zip(*in_order, strict=True))
        transformed, chosen = self.transform(results, seeds), torch.tensor(indices)
        pixels, draws = transformed if isinstance(transformed, tuple) else (transformed, None)
        return Read(Batch(pixels, self.images.targets[chosen], chosen), damaged, draws)


class TrainImages(ShuffledSamples):
    """A training loader: augmented, shuffled, full batches, and their files by name.

    Damaged images are skipped: the next image in the set is taken instead, so that the batches of
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
        balanced: as for `ShuffledSamples`.

    Raises:
        ValueError: fewer images than a batch, a batch that the ranks do not divide, or a number
            outside its range; while iterating, too many damaged images.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_damaged: float = MAX_DAMAGED,
        balanced: bool = False,
    ) -> None:
        shared = {"rank": rank, "world_size": world_size}
        super().__init__(images.targets, batch_size, seed=seed, balanced=balanced, **shared)
        self.images = images
        self.damaged = DamagedImages(images, max_damaged, every_class=True)
        """The images that could not be read so far, by this rank."""
        reader = _Reader(images, transform, seed, self.damaged.limit)
        self._loader = make_loader(reader, Plan(self.keys), workers)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in readable(self._loader, self.damaged))

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of the images."""
        return self.images.fingerprint()

    def describe(self, indices: Tensor) -> list[str]:
        """Returns the files of samples."""
        return [self.images.name(index) for index in indices.tolist()]


class EvalImages:
    """An evaluation loader: pairs `(images [B, 3, H, W], targets [B])`, in the order of the set.

    Every rank has samples of its own, each exactly once; no sample is repeated to fill a batch.
    Damaged images are left out, counted, and named on stderr, and too many of them are an error.

    Args:
        images: the images.
        preprocessing: from an image to a network's input.
        batch_size: images in a batch of this rank; the last may be smaller.
        rank: this process, counted from 0.
        world_size: how many processes share the images.
        workers: processes that read images for this rank; 0 reads in this one.
        damaged: what counts them, where several loaders of a set share it.

    Raises:
        ValueError: no images, or a number outside its range; while iterating, too many damaged
            images, or none that can be read.
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
        damaged: DamagedImages | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if len(images) == 0:
            raise ValueError("images: expected at least one to evaluate on, got none")
        self.images, self.batch_size = images, batch_size
        self.preprocessing, self.workers = preprocessing, workers
        self.damaged = damaged or DamagedImages(images)
        """The images that could not be read so far."""
        self._mine = range(rank, len(images), world_size)
        reader = _Reader(images, _Plain(preprocessing), 0, 0)
        self._loader = make_loader(reader, Plan(self._keys), workers)

    def __len__(self) -> int:
        return -(-len(self._mine) // self.batch_size)

    @property
    def targets(self) -> Tensor:
        """Returns the classes of all images of the set, by index; also of those that cannot be
        read."""
        return self.images.targets

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of the set, on every rank."""
        return self.images.fingerprint()

    def part(self, indices: Tensor) -> EvalImages:
        """Returns a loader of some images of the set, which reads no others."""
        images = self.images.subset(indices.tolist())
        damaged = DamagedImages(images, self.damaged.share)
        options: dict[str, Any] = {"workers": self.workers, "damaged": damaged}
        return EvalImages(images, self.preprocessing, self.batch_size, **options)

    def _keys(self) -> Iterator[Key]:
        for start in range(0, len(self._mine), self.batch_size):
            yield 0, list(self._mine[start : start + self.batch_size])

    def batches(self) -> Iterator[Batch]:
        """Yields full batches with the indices of their images in the set."""
        read = (batch for batch, _ in readable(self._loader, self.damaged))
        for tensors in full_batches(read, self.batch_size):
            yield Batch(*tensors)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.images, batch.targets) for batch in self.batches())


class _Plain:
    """The transform of an evaluation: no draws."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def open(self, images: ImageSet, indices: Sequence[int], _: Sequence[int]) -> list[Any]:
        return [attempt(images.image, index) for index in indices]

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
    """Yields a pass, with which its workers end; an OSError says what a failing one met."""
    iterator = iter(loader)
    try:
        yield from iterator
    except Exception as error:
        if not loader.num_workers:
            raise
        *_, reason = str(error).strip().splitlines() or [type(error).__name__]
        # They hold the iterator, and so the other workers.
        traceback.clear_frames(error.__traceback__)
    else:
        return
    finally:
        del iterator
    raise OSError(f"a process that reads images has failed: {reason}")


def measure_input(loader: TrainLoader, workers: int, seconds: float = 5.0) -> float:
    """Returns the images a second that a training loader gives to a process that only waits.

    Args:
        loader: of this process; its next pass has to be chosen anew.
        workers: its worker processes, whose first batches come all at once.
        seconds: after which the measurement ends.
    """
    loader.set_epoch(1)
    images, begun, batches = 0, time.perf_counter(), iter(loader)
    for number, batch in enumerate(batches):
        images += len(batch.images)
        if number == workers:
            images, begun = 0, time.perf_counter()
        elif images and time.perf_counter() - begun > seconds:
            break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    rate = images / max(time.perf_counter() - begun, 1e-9)
    del batches
    return rate


@atexit.register
def _end_workers() -> None:
    """Ends workers that an error has left behind.

    The interpreter's exit sends them a signal that they ignore, and waits for them without end.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        # PyTorch would raise an error for each worker that is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(1)
        worker.kill()


def readable(
    loader: DataLoader[Read], damaged: DamagedImages
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yields what could be read in one pass, with draws for the device where there are any.

    What could not be read is counted, in this process.
    """
    for read in passing(loader):
        for index, reason in read.damaged.items():
            damaged.add(index, reason)
        if read.batch is not None:
            yield read.batch, read.draws


def ignore_signals(worker: int = 0) -> None:
    """Makes a data loader's worker survive a signal to the whole process group.

    The training process needs it for the step that it finishes. For `DataLoader(worker_init_fn=)`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
