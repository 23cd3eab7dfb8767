"""Going through a loader once, and keeping the images where the coded part of a network begins.

What an experiment changes lies behind the input of the first coded block, the trunk's features.
They are computed once and kept in memory, or, where they are too large for it, once for every
segment of the images. B samples of a batch, n samples in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models import CodedResNeXt
from .budget import Budget
from .running import Loader, batches, evaluating

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
