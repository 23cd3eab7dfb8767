"""Predictions and energies of all images of a loader: the pass that the experiments share.

Letters as in docs/math.md: n samples, K classes, N branches, A of them active for each class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.data.batches import full_batches
from coded_resnext.data.image_sets import by_class
from coded_resnext.kernels.coded.reference import is_dead
from coded_resnext.models.decode import check_results, not_finite, read_class
from coded_resnext.models.resnext import CodedResNeXt

Loader = Iterable[tuple[Tensor, Tensor]]
"""Batches of images `[B, C, H, W]` and class indices `[B]`; every iteration starts afresh, in the
same order."""
Item = TypeVar("Item")
# Of more classes these are compared with each other, and so many scores are in memory at a time.
MOST_COMPARED, MOST_SCORES = 2000, 2**22
_INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class Observations:
    """Predictions and energies of n images in the order of their loader, all on the CPU."""

    class_names: tuple[str, ...]
    codebooks: tuple[Codebook, ...]
    """The codebook of every coded block; none for a plain network."""
    targets: Tensor
    """True classes, `[n]`."""
    predictions: Tensor
    """Classes that the network says, `[n]`."""
    confidences: Tensor
    """Softmax probability of each prediction, `[n]`."""
    energies: tuple[Tensor, ...]
    """Normalised energies, (4), of every coded block, `[n, N]`."""
    decoded: tuple[Tensor, ...]
    """Early decoding, (9), of every coded block, `[n]`."""
    probabilities: Tensor
    """Mean softmax probabilities by true class of the compared classes, `[k, k]` in float64; NaN
    rows without images."""
    image_size: tuple[int, int]
    """Height and width of the images."""
    compared: tuple[int, ...] | None = None
    """The classes, ascending, whose pairs are compared; None for all."""

    @property
    def samples(self) -> int:
        """Returns the number of images, n."""
        return len(self.predictions)

    @property
    def accuracy(self) -> float:
        """Returns the share of the images that the network classifies correctly."""
        return int((self.predictions == self.targets).sum()) / self.samples


def observe(model: CodedResNeXt, loader: Loader, *, seed: int = 0) -> Observations:
    """Run a network on every image once.

    Memory grows by images times branches, not by images or classes times classes: a batch's logits
    are let go, and of more than 2,000 classes a draw is compared.

    Args:
        model: coded or plain; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        seed: decides which of many classes are compared.

    Raises:
        ValueError: the loader has no batch, or targets are not class indices of the model.
    """
    columns: list[tuple[Tensor, ...]] = []
    compared = torch.arange(model.num_classes)
    if model.num_classes > MOST_COMPARED:
        order = np.random.default_rng((seed, 5)).permutation(model.num_classes)
        compared = torch.from_numpy(order[:MOST_COMPARED]).sort().values
    place = torch.full((model.num_classes,), -1)
    place[compared] = torch.arange(len(compared))
    sums = torch.zeros(len(compared), len(compared), dtype=torch.float64)
    image_size = (0, 0)
    with evaluating(model):
        for images, targets in batches(model, loader, "test images"):
            image_size = (images.shape[2], images.shape[3])
            logits, energies = model(images, return_energies=True)
            check_results(model, not_finite(logits, energies))
            exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
            logits = logits.to("cpu", exact)
            likely, predictions = logits.softmax(1), logits.argmax(1)
            places = place[targets.cpu()]
            chances = likely[places >= 0][:, compared].double()
            sums.index_add_(0, places[places >= 0], chances)
            confidences = likely.gather(1, predictions[:, None])[:, 0]
            of_blocks = [energy.cpu() for energy in energies]
            columns.append((targets.cpu(), predictions, confidences, *of_blocks))
    targets, predictions, confidences, *whole = map(torch.cat, zip(*columns, strict=True))
    all_energies = tuple(
        energy if block.normalize else normalized(energy)
        for energy, block in zip(whole, model.coded_blocks, strict=True)
    )
    counts = targets.bincount(minlength=model.num_classes)
    return Observations(
        class_names=model.class_names,
        codebooks=model.codebooks,
        targets=targets,
        predictions=predictions,
        confidences=confidences,
        energies=all_energies,
        decoded=tuple(
            read_classes(energy, book)[0]
            for energy, book in zip(all_energies, model.codebooks, strict=True)
        ),
        # A class without images divides 0 by 0: NaN.
        probabilities=sums.div_(counts[compared, None]),
        image_size=image_size,
        compared=None if len(compared) == model.num_classes else tuple(compared.tolist()),
    )


def read_classes(energies: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Returns as `read_class` what early decoding says of all images, some of them at a time."""
    parts = torch.split(energies, max(1, MOST_SCORES // book.classes))
    read = [read_class(part, book.codewords) for part in parts]
    classes, margins = map(torch.cat, zip(*read, strict=True))
    return classes, margins


def normalized(energies: Tensor) -> Tensor:
    """(4), of the energies (2) that the ablation without normalisation returns."""
    mean = energies.mean(1, keepdim=True)
    return torch.where(is_dead(mean), 0.0, energies / mean)


def draw_rows(targets: Tensor, images: int | None, seed: int) -> Tensor:
    """Returns a seeded draw of about so many of the images, the same share of every class.

    Args:
        targets: classes of all images, `[n]`.
        images: how many are drawn, and at least one of each class; None takes all.
        seed: decides the draw; a larger draw of one seed contains a smaller one.

    Returns:
        Places of the images that are drawn, `[m]`, ascending.
    """
    if images is None:
        return torch.arange(len(targets))
    rows = []
    for target, members in by_class(targets).items():
        order = np.random.default_rng((seed, 1, target)).permutation(len(members))
        rows.append(members[order[: max(1, round(len(members) * images / len(targets)))]])
    return torch.from_numpy(np.sort(np.concatenate(rows)))


class DrawnImages:
    """A loader of some images of a loader, in its order, in batches as large as its first one.

    Args:
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        rows: places of the images in the loader, `[m]`, ascending.
    """

    def __init__(self, loader: Loader, rows: Tensor) -> None:
        self.loader, self.rows = loader, rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = iter(self.loader)
        first = next(parts, None)
        if first is not None:
            drawn = full_batches(self._drawn(chain([first], parts)), len(first[1]))
            yield from ((images, targets) for images, targets in drawn)

    def _drawn(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for images, targets in parts:
            low, high = torch.searchsorted(self.rows, torch.tensor([start, start + len(targets)]))
            places = self.rows[low:high] - start
            start += len(targets)
            if len(places):
                yield images[places], targets[places]


def require_same_order(targets: Tensor, known: Tensor) -> None:
    """Refuse a loader whose later pass gives other images than its first one, as shuffling does.

    Args:
        targets: classes of some images in this pass, `[B]` or, if there are fewer, what is left.
        known: classes at the same places in the first pass.

    Raises:
        ValueError: they differ.
    """
    if not torch.equal(targets.cpu().long(), known.cpu().long()):
        raise ValueError(
            "loader: expected the same images in the same order in every pass, got other classes "
            "than in the first pass; a loader for evaluation must not shuffle"
        )


def read_targets(model: CodedResNeXt, loader: Loader) -> Tensor:
    """The checked classes of all images of a loader, `[n]` on the CPU; raises as `batches`."""
    return torch.cat([targets.cpu() for _, targets in batches(model, loader, "targets")])


class _WithoutTargets:
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, _ in self.loader:
            yield images, torch.zeros(len(images), dtype=torch.int64)


class _SizedWithoutTargets(_WithoutTargets):
    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def without_targets(loader: Loader) -> Loader:
    """The images of a loader, all as class 0: images outside the classes have no class here."""
    return _SizedWithoutTargets(loader) if isinstance(loader, Sized) else _WithoutTargets(loader)


@dataclass
class _Use:
    """A network in evaluation."""

    modes: list[tuple[torch.nn.Module, bool]]
    """What every module had before."""
    threads: int = 0


_LOCK = Lock()
_IN_USE: dict[CodedResNeXt, _Use] = {}


@contextmanager
def evaluating(model: CodedResNeXt) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode that it had.

    Several threads may be within at a time: the last one gives the modes back.
    """
    with _LOCK:
        use = _IN_USE.setdefault(model, _Use([(m, m.training) for m in model.modules()]))
        use.threads += 1
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        with _LOCK:
            use.threads -= 1
            if not use.threads:
                del _IN_USE[model]
                for module, training in use.modes:
                    module.training = training


def require_coded_blocks(coded: Sequence[object]) -> None:
    """Refuse a network without coded blocks, on which most experiments are not defined.

    Args:
        coded: its coded blocks, or their codebooks.
    """
    if not coded:
        raise ValueError(
            "model: expected at least one coded block, got a plain network, which has no codebook"
        )


def require_at_least(low: int, **numbers: int | None) -> None:
    """Refuse arguments, given by name, that are below a number; None is no number."""
    for name, number in numbers.items():
        if number is not None and number < low:
            raise ValueError(f"{name}: expected at least {low}, got {number}")


def batches(model: CodedResNeXt, loader: Loader, activity: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The checked batches of a loader on the device (and in the dtype) of the model, with progress.

    Args:
        model: whose device, dtype and number of classes count.
        loader: batches of images `[B, C, H, W]` and targets `[B]`.
        activity: what is being done, for the progress bar.

    Raises:
        ValueError: the loader has no batch, images are not floating-point `[B, C, H, W]`, or
            targets are not one class index of the model for each image.
    """
    parameter = next(model.parameters())
    empty = True
    for images, targets in with_progress(loader, activity):
        empty = False
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(
                "images: expected a floating-point tensor [B, C, H, W] with B >= 1, "
                f"got {images.dtype} {list(images.shape)}"
            )
        if targets.shape != images.shape[:1] or targets.dtype not in _INDEX_TYPES:
            raise ValueError(
                f"targets: expected {len(images)} integer class indices, "
                f"got {targets.dtype} {list(targets.shape)}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= model.num_classes:
            raise ValueError(
                f"targets: expected classes 0 to {model.num_classes - 1} of the model, "
                f"got {low if low < 0 else high}"
            )
        yield images.to(parameter), targets.to(parameter.device).long()
    if empty:
        raise ValueError("loader: expected at least one batch, got none")


def trunk(model: CodedResNeXt, images: Tensor) -> Tensor:
    """Returns the input of the first coded block."""
    return model.features(images, stop=_position(model, 0) if model.coded_blocks else None)[0]


def coded_inputs(model: CodedResNeXt, x: Tensor) -> list[Tensor]:
    """Returns the inputs of all coded blocks, from that of the first one; to `resume` from."""
    first, last = _position(model, 0), _position(model, -1)
    inputs = [x]
    following = model.blocks[first + 1 :]
    for step, block in zip(model.walk(x, start=first, stop=last), following, strict=False):
        if block.is_coded:
            inputs.append(step.map)
    return inputs


def _position(model: CodedResNeXt, coded_block: int) -> int:
    """Returns the index of a coded block among all blocks."""
    return model.blocks.index(model.coded_blocks[coded_block])


def resume(
    model: CodedResNeXt, x: Tensor, start: int, keep_masks: Sequence[Tensor | None]
) -> Tensor:
    """Returns the logits of a network that goes on from the input of one of its coded blocks.

    This equals `model(images, keep=...)` at a fraction of the cost when many masks are tried on
    the same images.

    Args:
        model: in evaluation mode.
        x: input of the coded block.
        start: which coded block, counted from 0.
        keep_masks: `[B, N]` or None for every coded block from `start` on, (10).

    Returns:
        `[B, K]`.
    """
    return resume_with_energies(model, x, start, keep_masks)[0]


def resume_with_energies(
    model: CodedResNeXt, x: Tensor, start: int, keep_masks: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """Does as `resume`, and also returns the energies `[B, N]` of the coded blocks on the way."""
    x, energies = model.features(x, keep_masks, start=_position(model, start))
    return model.forward_head(x), energies


def with_progress(loader: Iterable[Item], activity: str, unit: str = "batch") -> Iterable[Item]:
    """Returns the items behind a progress bar, where tqdm is installed and a person is watching."""
    if not sys.stderr.isatty():
        return loader
    try:
        from tqdm import tqdm
    except ImportError:
        return loader
    shown: Iterable[Item] = tqdm(loader, desc=activity, unit=unit, leave=False, file=sys.stderr)
    return shown
