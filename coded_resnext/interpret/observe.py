"""Predictions and energies of all images of a loader: the pass that the experiments share.

Letters as in docs/math.md: n samples, K classes, N branches, A of them active for each class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import length_hint
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.data.batches import full_batches
from coded_resnext.data.image_sets import by_class
from coded_resnext.kernels.coded.reference import is_dead
from coded_resnext.models.loss import check_results, not_finite, read_class
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
    margins: tuple[Tensor, ...]
    """Margins of these classes, as early exit measures them, `[n]`."""
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
    """Runs a network on every image once.

    Memory grows by images times branches, not by images or classes times classes: a batch's logits
    are let go, and of more than 2,000 classes a draw is compared.

    Args:
        model: coded or plain; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        seed: decides which of many classes are compared.

    Raises:
        ValueError: the loader has no batch, or targets are not class indices of the model.
    """
    observer = Observer(model, seed)
    stream(model, loader, "test images", [(observer.add, None)])
    return observer.result()


class Observer:
    """Gathers what `observe` returns, a part of the images at a time; arguments as for it."""

    def __init__(self, model: CodedResNeXt, seed: int) -> None:
        self.model = model
        self._columns: list[tuple[Tensor, ...]] = []
        compared = torch.arange(model.num_classes)
        if model.num_classes > MOST_COMPARED:
            order = np.random.default_rng((seed, 5)).permutation(model.num_classes)
            compared = torch.from_numpy(order[:MOST_COMPARED]).sort().values
        self._compared, self._row_of_class = compared, torch.full((model.num_classes,), -1)
        self._row_of_class[compared] = torch.arange(len(compared))
        self._sums = torch.zeros(len(compared), len(compared), dtype=torch.float64)
        self._image_size = (0, 0)

    def add(self, part: Part) -> None:
        """Takes the next images."""
        self._image_size = part.image_size
        x, energies = self.model.features(part.features, start=first_coded(self.model))
        logits = self.model.forward_head(x)
        check_results(self.model, not_finite(logits, energies))
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits = logits.to("cpu", exact)
        likely, predictions = logits.softmax(1), logits.argmax(1)
        rows = self._row_of_class[part.targets]
        chances = likely[rows >= 0][:, self._compared].double()
        self._sums.index_add_(0, rows[rows >= 0], chances)
        confidences = likely.gather(1, predictions[:, None])[:, 0]
        of_blocks = [energy.cpu() for energy in energies]
        self._columns.append((part.targets, predictions, confidences, *of_blocks))

    def result(self) -> Observations:
        """Returns what was seen."""
        model, compared = self.model, self._compared
        targets, predictions, confidences, *whole = map(torch.cat, zip(*self._columns, strict=True))
        all_energies = tuple(
            energy if block.normalize else normalized(energy)
            for energy, block in zip(whole, model.coded_blocks, strict=True)
        )
        counts = targets.bincount(minlength=model.num_classes)
        read = [
            read_classes(energy, book)
            for energy, book in zip(all_energies, model.codebooks, strict=True)
        ]
        return Observations(
            class_names=model.class_names,
            codebooks=model.codebooks,
            targets=targets,
            predictions=predictions,
            confidences=confidences,
            energies=all_energies,
            decoded=tuple(classes for classes, _ in read),
            margins=tuple(margins for _, margins in read),
            # A class without images divides 0 by 0: NaN.
            probabilities=self._sums / counts[compared, None],
            image_size=self._image_size,
            compared=None if len(compared) == model.num_classes else tuple(compared.tolist()),
        )


class Part(NamedTuple):
    """Images on their way through a network, for all that wants them; then they are let go."""

    features: Tensor
    """Input of the first coded block, `[B, C, H, W]`; of a plain network, the last map."""
    targets: Tensor
    """Classes `[B]`, on the CPU."""
    positions: Tensor
    """Places in the loader `[B]`, ascending, on the CPU."""
    image_size: tuple[int, int]
    """Height and width of the images."""
    at_a_time: int
    """Images that the loader gives at a time, and that a pass is to have where there are more."""


Use = Callable[[Part], None]


def stream(
    model: CodedResNeXt,
    loader: Loader,
    activity: str,
    uses: Iterable[tuple[Use, Tensor | None]],
    known: Tensor | None = None,
) -> None:
    """Takes every image once through the blocks before the coded ones, and hands the results on.

    Args:
        model: its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        activity: what is being done, for the progress bar.
        uses: what takes the parts, each with the positions of the images that it wants, ascending,
            which come in batches as large as the first one; None for all, as they come.
        known: the classes of all images by their positions, by which the pass was planned.

    Raises:
        ValueError: as `batches`, or the images have other classes than those by which was planned.
    """
    draws = [_Draw(*use) for use in uses]
    batch_size = 0
    with evaluating(model):
        for images, targets, positions in batches(model, loader, activity):
            batch_size = batch_size or len(images)
            if known is not None:
                require_same_order(targets, known, positions)
            image_size = (images.shape[2], images.shape[3])
            part = Part(trunk(model, images), targets.cpu(), positions, image_size, batch_size)
            for draw in draws:
                draw.take(part)
        for draw in draws:
            draw.hand_on(part, rest=True)


class _Draw:
    """Hands the images that are wanted on, and holds those back that do not fill a batch."""

    def __init__(self, use: Use, rows: Tensor | None) -> None:
        self.use, self.rows = use, rows
        self._waiting: list[tuple[Tensor, ...]] = []

    def take(self, part: Part) -> None:
        if self.rows is None:
            return self.use(part)
        wanted = torch.isin(part.positions, self.rows, assume_unique=True).nonzero()[:, 0]
        if len(wanted):
            features = part.features[wanted.to(part.features.device)]
            self._waiting.append((features, part.targets[wanted], part.positions[wanted]))
        return self.hand_on(part, rest=False)

    def hand_on(self, like: Part, *, rest: bool) -> None:
        waiting, self._waiting = self._waiting, []
        if not rest and sum(len(positions) for *_, positions in waiting) < like.at_a_time:
            self._waiting = waiting
            return
        for features, targets, positions in full_batches(waiting, like.at_a_time):
            if rest or len(positions) == like.at_a_time:
                self.use(Part(features, targets, positions, like.image_size, like.at_a_time))
            else:
                self._waiting.append((features, targets, positions))


def read_classes(energies: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Returns as `read_class` what early decoding says of all images, some of them at a time."""
    parts = torch.split(energies, max(1, MOST_SCORES // book.classes))
    read = [read_class(part, book.codewords) for part in parts]
    classes, margins = map(torch.cat, zip(*read, strict=True))
    return classes, margins


def normalized(energies: Tensor) -> Tensor:
    """Returns (4) of the energies (2) that the ablation without normalisation returns."""
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
        rows: positions of the images in the loader, `[m]`, ascending.
    """

    def __init__(self, loader: Loader, rows: Tensor) -> None:
        self.loader, self.rows = loader, rows

    @property
    def targets(self) -> Tensor | None:
        """Returns the classes of the images, where the loader tells them."""
        told = getattr(self.loader, "targets", None)
        return None if told is None else told[self.rows]

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
            positions = self.rows[low:high] - start
            start += len(targets)
            if len(positions):
                yield images[positions], targets[positions]


def require_same_order(targets: Tensor, known: Tensor, positions: Tensor) -> None:
    """Refuses a loader that gives other images than those a pass was planned by, as shuffling does.

    Args:
        targets: classes of some images in this pass, `[B]`.
        known: classes of all images, by their positions.
        positions: positions of these images, `[B]`, ascending.

    Raises:
        ValueError: they differ.
    """
    if int(positions[-1]) >= len(known) or not torch.equal(targets.cpu(), known[positions]):
        raise ValueError(
            "loader: expected the same images in the same order in every pass, got other classes "
            "than in the first pass; a loader for evaluation must not shuffle"
        )


def read_targets(model: CodedResNeXt, loader: Loader) -> Tensor:
    """Returns the classes of all images of a loader by their positions, `[n]` on the CPU.

    A loader that tells them, as `targets`, is believed; of others the images are read. Raises as
    `batches`.
    """
    told = getattr(loader, "targets", None)
    if isinstance(told, Tensor) and told.ndim == 1 and told.dtype in _INDEX_TYPES:
        _require_classes(model, told)
        return told.cpu().long()
    return torch.cat([targets.cpu() for _, targets, _ in batches(model, loader, "targets")])


@runtime_checkable
class _KnowsPositions(Protocol):
    """A loader that says which images of its set it gives; damaged ones leave gaps."""

    @property
    def targets(self) -> Tensor | None: ...

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...


def numbered(loader: Loader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the batches of a loader with the positions of their images, `[B]`."""
    if isinstance(loader, _KnowsPositions):
        yield from loader.batches()
        return
    start = 0
    for images, targets in loader:
        yield images, targets, torch.arange(start, start + len(images))
        start += len(images)


class _WithoutTargets:
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, targets) for images, targets, _ in self.batches())

    @property
    def targets(self) -> Tensor | None:
        told = getattr(self.loader, "targets", None)
        return None if told is None else torch.zeros(len(told), dtype=torch.int64)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, _, positions in numbered(self.loader):
            yield images, torch.zeros(len(images), dtype=torch.int64), positions


def without_targets(loader: Loader) -> Loader:
    """Returns the images of a loader, all as class 0: images outside the classes have no class
    here."""
    return _WithoutTargets(loader)


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
    """Evaluates without gradients; afterwards every module has the mode that it had.

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
    """Refuses a network without coded blocks, on which most experiments are not defined.

    Args:
        coded: its coded blocks, or their codebooks.
    """
    if not coded:
        raise ValueError(
            "model: expected at least one coded block, got a plain network, which has no codebook"
        )


def require_at_least(low: int, **numbers: int | None) -> None:
    """Refuses arguments, given by name, that are below a number; None is no number."""
    for name, number in numbers.items():
        if number is not None and number < low:
            raise ValueError(f"{name}: expected at least {low}, got {number}")


def batches(
    model: CodedResNeXt, loader: Loader, activity: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the checked batches of a loader on the model's device and in its dtype.

    The third of each are the positions of its images, `[B]` on the CPU.

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
    total = length_hint(loader) or None
    for images, targets, positions in with_progress(numbered(loader), activity, total=total):
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
        _require_classes(model, targets)
        yield images.to(parameter), targets.to(parameter.device).long(), positions.cpu()
    if empty:
        raise ValueError("loader: expected at least one batch, got none")


def _require_classes(model: CodedResNeXt, targets: Tensor) -> None:
    low, high = map(int, targets.aminmax())
    if low < 0 or high >= model.num_classes:
        raise ValueError(
            f"targets: expected classes 0 to {model.num_classes - 1} of the model, "
            f"got {low if low < 0 else high}"
        )


def trunk(model: CodedResNeXt, images: Tensor) -> Tensor:
    """Returns the input of the first coded block; of a plain network, the last map."""
    return model.features(images, stop=first_coded(model))[0]


def coded_walk(model: CodedResNeXt, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Returns inputs, to `resume` from, and energies of all coded blocks, and the logits.

    Args:
        model: in evaluation mode, with coded blocks.
        x: input of the first one.
    """
    inputs, energies = [], []
    for step in model.walk(x, start=first_coded(model)):
        if step.energies is not None:
            inputs.append(x)
            energies.append(step.energies)
        x = step.map
    return inputs, energies, model.forward_head(x)


def first_coded(model: CodedResNeXt) -> int:
    """Returns the index of the first coded block among all blocks; their number without any."""
    return _position(model, 0) if model.coded_blocks else len(model.blocks)


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


def with_progress(
    items: Iterable[Item], activity: str, unit: str = "batch", total: int | None = None
) -> Iterable[Item]:
    """Returns the items behind a progress bar, where tqdm is installed and a person is watching."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    shown: Iterable[Item] = tqdm(
        items, desc=activity, unit=unit, total=total, leave=False, file=sys.stderr
    )
    return shown
