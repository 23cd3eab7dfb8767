"""What a network does with every image of a loader: one pass, from which experiments are computed.

Letters as in docs/math.md: n samples, K classes, N branches, A of them active for each class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.kernels.coded.reference import is_dead
from coded_resnext.models.decode import decode
from coded_resnext.models.resnext import CodedResNeXt

from .budget import Budget

# Of a limited time, for this pass; what it leaves is for the experiments that need more passes.
TIME_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Observations:
    """Predictions and energies of n images; all tensors are on the CPU."""

    class_names: tuple[str, ...]
    codebooks: tuple[Codebook, ...]
    """Of every coded block; none for a plain network."""
    gathered: Gathered
    """The pass itself: targets, places in the loader, features."""
    predictions: Tensor
    """Classes that the network says, `[n]`."""
    confidences: Tensor
    """Softmax probability of each, `[n]`."""
    energies: tuple[Tensor, ...]
    """Normalised energies, (4), of every coded block, `[n, N]`."""
    decoded: tuple[Tensor, ...]
    """Early decoding, (9), of every coded block, `[n]`."""
    probabilities: Tensor
    """Mean softmax probabilities by true class, `[K, K]` in float64; NaN rows without images."""

    @property
    def targets(self) -> Tensor:
        """True classes, `[n]`."""
        return self.gathered.targets

    @property
    def samples(self) -> int:
        """The number of images, n."""
        return len(self.predictions)

    @property
    def accuracy(self) -> float:
        """Share of the images that the network classifies correctly."""
        return int((self.predictions == self.targets).sum()) / self.samples


def observe(
    model: CodedResNeXt,
    loader: Loader,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    looked_at: float | None = None,
) -> Observations:
    """Run a network on every image once.

    Args:
        model: coded or plain; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        budget: under a limit, a seeded subset of the images is run when all would take more than
            half of the time that remains.
        seed: of that subset.
        looked_at: share of the images to run, in place of what the time suffices for.

    Raises:
        ValueError: the loader has no batch, or targets are not class indices of the model.
    """
    names = [f"energies_{index}" for index in range(len(model.coded_blocks))]
    with evaluating(model), _first_coded_input(model) as seen:

        def compute(images: Tensor) -> tuple[Tensor | None, Found]:
            seen.clear()
            logits, energies = model(images, return_energies=True)
            accurate = torch.float64 if logits.dtype == torch.float64 else torch.float32
            found = {"logits": logits.to(accurate), **dict(zip(names, energies, strict=True))}
            return (seen[0] if seen else None), found

        gathered = gather(
            model,
            loader,
            "test images",
            compute,
            budget=budget,
            share=TIME_SHARE,
            seed=seed,
            looked_at=looked_at,
        )
    found = gathered.found
    likely = found["logits"].softmax(1)
    energies = tuple(
        found[name] if block.normalize else _normalized(found[name])
        for name, block in zip(names, model.coded_blocks, strict=True)
    )
    sums = torch.zeros(model.num_classes, model.num_classes, dtype=torch.float64)
    sums.index_add_(0, gathered.targets, likely.double())
    counts = gathered.targets.bincount(minlength=model.num_classes)
    predictions = found["logits"].argmax(1)
    return Observations(
        class_names=model.class_names,
        codebooks=model.codebooks,
        gathered=gathered,
        predictions=predictions,
        confidences=likely.gather(1, predictions[:, None])[:, 0],
        energies=energies,
        decoded=tuple(
            decode(energy, book) for energy, book in zip(energies, model.codebooks, strict=True)
        ),
        # A class without images divides 0 by 0: NaN.
        probabilities=sums / counts[:, None],
    )


def _normalized(energies: Tensor) -> Tensor:
    """(4), of the energies (2) that the ablation without normalisation returns."""
    mean = energies.mean(1, keepdim=True)
    return torch.where(is_dead(mean), 0.0, energies / mean)


@contextmanager
def _first_coded_input(model: CodedResNeXt) -> Iterator[list[Tensor]]:
    """A list that holds, after a pass, the input of the first coded block."""
    seen: list[Tensor] = []
    blocks = model.coded_blocks
    if not blocks:
        yield seen
        return
    handle = blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


FEATURE_BYTES = 2**30


Found = dict[str, Tensor]


Compute = Callable[[Tensor], tuple[Tensor | None, Found]]


"""From images `[B, C, H, W]` to their features `[B, C', H', W']`, and whatever else is wanted."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Samples at the input of the first coded block."""

    rows: Tensor
    """Which of the gathered samples, `[m]`, ascending."""
    features: Tensor
    """`[m, C, H, W]`."""

    def where(self, rows: Tensor) -> Tensor:
        """The places in this segment of those of the rows that it has."""
        return torch.isin(self.rows, rows).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Gathered:
    """What one pass over a loader has left."""

    targets: Tensor
    """Class indices `[n]`."""
    positions: Tensor
    """Places of the samples in the loader, `[n]`, ascending."""
    available: int
    """Samples that the loader has; n of them were looked at, all unless time was limited."""
    kept: Segment | None
    """Features of all samples, or of a seeded subset under a limit of time; None if too large."""
    found: Found
    """What else was computed, each `[n, ..]`, on the CPU."""
    batch_size: int
    image_size: tuple[int, int]
    """Height and width."""
    seconds: float
    """Time that a sample took, loading included."""
    looked_at: float
    """Share of the samples that was aimed at, 0 to 1."""


def gather(
    model: CodedResNeXt,
    loader: Loader,
    activity: str,
    compute: Compute,
    *,
    budget: Budget | None = None,
    share: float = 1.0,
    seed: int = 0,
    looked_at: float | None = None,
    feature_bytes: int = FEATURE_BYTES,
) -> Gathered:
    """Go through a loader once.

    Args:
        model: in evaluation mode.
        loader: batches of images and class indices.
        activity: what is being done, for the progress bar.
        compute: what is wanted of a batch of images.
        budget: under a limit a seeded subset of the images is looked at, as many as `share` of the
            remaining time is likely to suffice for; a loader without a length is gone through.
        share: of the remaining time, 0 to 1.
        seed: of the subset.
        looked_at: share of the images to look at, in place of what the time suffices for.
        feature_bytes: memory for features. Where all of them need more, none are kept; under a
            limit of time those of a subset are, for there is no second pass then.

    Raises:
        ValueError: as `running.batches`.
    """
    budget = budget or Budget()
    generator = np.random.default_rng((seed, 0))
    allowed = share * budget.remaining
    total = len(loader) if isinstance(loader, Sized) else None
    chosen_share = 1.0 if looked_at is None else looked_at
    store: _FeatureStore | None = None
    targets_seen: list[Tensor] = []
    positions: list[Tensor] = []
    others: list[Found] = []
    taken = 0
    available = batch_size = 0
    size = (0, 0)
    begin = last = budget.clock()
    for images, targets in batches(model, loader, activity):
        count = len(targets)
        # One draw for every sample, whatever is done with it: subsets do not depend on the batches.
        draws = torch.from_numpy(generator.random((count, 2)))
        if not available:
            batch_size, size = count, (images.shape[2], images.shape[3])
            if budget.is_limited and total is not None and looked_at is None:
                compute(images)
                now = budget.clock()
                chosen_share = min(1.0, allowed / max(total * (now - last), 1e-9))
                begin = now
        chosen = draws[:, 0] < chosen_share
        if not available:
            chosen[0] = True
        if bool(chosen.any()):
            features, found = compute(
                images if bool(chosen.all()) else images[chosen.to(images.device)]
            )
            if features is not None:
                if store is None:
                    estimate = (
                        None if total is None else round(chosen_share * total * count) + count
                    )
                    store = _FeatureStore(features, estimate, feature_bytes, budget.is_limited)
                store.add(features, draws[chosen, 1], taken)
            taken += int(chosen.sum())
            targets_seen.append(targets[chosen.to(targets.device)].cpu())
            positions.append(available + chosen.nonzero()[:, 0])
            others.append({name: value.cpu() for name, value in found.items()})
        available += count
        last = budget.clock()
    all_targets = torch.cat(targets_seen)
    return Gathered(
        targets=all_targets,
        positions=torch.cat(positions),
        available=available,
        kept=store.segment() if store else None,
        found={name: torch.cat([part[name] for part in others]) for name in others[0]},
        batch_size=batch_size,
        image_size=size,
        seconds=max(last - begin, 0.0) / len(all_targets),
        looked_at=chosen_share,
    )


def segments(
    model: CodedResNeXt,
    loader: Loader,
    gathered: Gathered,
    *,
    feature_bytes: int = FEATURE_BYTES,
) -> Iterator[Segment]:
    """The gathered samples at the input of the first coded block, as many at a time as fit.

    Features that were kept are all that is given; otherwise the loader is gone through again.
    """
    if gathered.kept is not None:
        yield gathered.kept
        return
    wanted = torch.zeros(gathered.available, dtype=torch.bool)
    wanted[gathered.positions] = True
    first = position = 0
    parts: list[Tensor] = []
    with evaluating(model):
        for images, _ in batches(model, loader, "features"):
            chosen = wanted[position : position + len(images)]
            position += len(images)
            if bool(chosen.any()):
                parts.append(trunk(model, images if bool(chosen.all()) else images[chosen]))
            held = sum(part.nbytes for part in parts)
            # Another part must fit, and for a moment all of them twice.
            if parts and 2 * (held + parts[-1].nbytes) > feature_bytes:
                segment = _joined(parts, first)
                first, parts = first + len(segment.rows), []
                yield segment
    if parts:
        yield _joined(parts, first)


def trunk(model: CodedResNeXt, images: Tensor) -> Tensor:
    """The input of the first coded block."""
    x: Tensor = model.stem(images)
    for block in model.blocks:
        if block.is_coded:
            break
        x, _ = block(x)
    return x


def gather_features(
    model: CodedResNeXt,
    loader: Loader,
    activity: str,
    *,
    budget: Budget | None = None,
    share: float = 1.0,
    seed: int = 0,
    looked_at: float | None = None,
) -> Gathered:
    """Only the features and targets of a loader."""
    with evaluating(model):
        return gather(
            model,
            loader,
            activity,
            lambda images: (trunk(model, images), {}),
            budget=budget,
            share=share,
            seed=seed,
            looked_at=looked_at,
        )


def _joined(parts: list[Tensor], first: int) -> Segment:
    features = torch.cat(parts)
    return Segment(torch.arange(first, first + len(features)), features)


class _FeatureStore:
    """Features of samples as they come, up to a limit of memory."""

    def __init__(
        self, example: Tensor, samples: int | None, limit: int, subset_allowed: bool
    ) -> None:
        room = limit // example[0].nbytes
        self.share = 1.0 if samples is None else min(1.0, room / samples)
        if self.share < 1 and not subset_allowed:
            room = 0
        self.subset_allowed = subset_allowed
        last = example.is_contiguous(memory_format=torch.channels_last)
        capacity = room if samples is None else min(room, samples)
        self.buffer = torch.empty(
            (capacity, *example.shape[1:]),
            dtype=example.dtype,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        self.rows: list[Tensor] = []
        self.count = 0
        self.is_whole = True

    def add(self, features: Tensor, draws: Tensor, first_row: int) -> None:
        """Keep the features whose draw, 0 to 1, is below the share that fits."""
        places = (draws < self.share).nonzero()[:, 0]
        places = places[: len(self.buffer) - self.count]
        self.is_whole &= len(places) == len(features)
        self.buffer[self.count : self.count + len(places)] = features[places]
        self.rows.append(first_row + places)
        self.count += len(places)

    def segment(self) -> Segment | None:
        """What was kept; None when that is nothing, or less than was asked for."""
        if not self.count or not (self.is_whole or self.subset_allowed):
            return None
        return Segment(torch.cat(self.rows), self.buffer[: self.count])


Loader = Iterable[tuple[Tensor, Tensor]]


"""Batches of images `[B, C, H, W]` and class indices `[B]`; every iteration starts afresh."""


Item = TypeVar("Item")


@contextmanager
def evaluating(model: CodedResNeXt) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def require_coded_blocks(model: CodedResNeXt) -> None:
    """Refuse a network without coded blocks, on which most experiments are not defined."""
    if not model.coded_blocks:
        raise ValueError(
            "model: expected at least one coded block, got a plain network, which has no codebook"
        )


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


def coded_inputs(model: CodedResNeXt, x: Tensor) -> list[Tensor]:
    """The inputs of all coded blocks, from that of the first one; to `resume` from."""
    inputs = []
    for block in model.blocks[model.blocks.index(model.coded_blocks[0]) :]:
        if block.is_coded:
            inputs.append(x)
        if len(inputs) == len(model.coded_blocks):
            break
        x, _ = block(x)
    return inputs


def resume(
    model: CodedResNeXt, x: Tensor, start: int, keep_masks: Sequence[Tensor | None]
) -> Tensor:
    """The logits of a network that goes on from the input of one of its coded blocks.

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
    """As `resume`; besides the logits the energies `[B, N]` of the coded blocks from `start` on."""
    masks = iter(keep_masks)
    all_energies = []
    for block in model.blocks[model.blocks.index(model.coded_blocks[start]) :]:
        if block.is_coded:
            x, energies = block(x, keep_mask=next(masks))
            all_energies.append(energies)
        else:
            x, _ = block(x)
    return model.head(x.mean((2, 3))), all_energies


_INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def with_progress(loader: Iterable[Item], activity: str, unit: str = "batch") -> Iterable[Item]:
    """The items behind a progress bar, where tqdm is installed and a person is watching."""
    if not sys.stderr.isatty():
        return loader
    try:
        from tqdm import tqdm
    except ImportError:
        return loader
    shown: Iterable[Item] = tqdm(loader, desc=activity, unit=unit, leave=False, file=sys.stderr)
    return shown
