"""Removing branches: what a network loses without the branches of a class, and without others.

Letters as in docs/math.md: B samples, N branches, A of them active for each class.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from coded_resnext.models.resnext import CodedResNeXt

from .budget import Budget, Ledger
from .observe import (
    FEATURE_BYTES,
    Loader,
    Observations,
    Segment,
    coded_inputs,
    evaluating,
    observe,
    require_coded_blocks,
    resume,
    segments,
)
from .records import describe

Kind = Literal["active", "inactive"]
KINDS: tuple[Kind, Kind] = ("active", "inactive")
# Under a limit of time at least so many images; fewer would say nothing.
FEWEST_SAMPLES = 50


@dataclass(frozen=True)
class RemovalCurve:
    """Accuracy and energy against the number of branches that every sample loses in one block.

    Numbers are means over the repeats with their standard deviations (n - 1); a deviation is 0
    where there was one repeat, and when all branches of the kind are removed, which leaves nothing
    to chance. None is "not computed", for which the time was too short.
    """

    removed: tuple[int, ...]
    """1 up to all branches of the kind."""
    accuracy: tuple[float | None, ...]
    """As a share, 0 to 1."""
    deviation: tuple[float | None, ...]
    """Of the accuracy."""
    energy: tuple[float | None, ...]
    """Share of the block's energy, as it was before, that the branches left have, 0 to 1."""
    energy_deviation: tuple[float | None, ...]


@dataclass(frozen=True)
class BlockRemoval:
    """Both curves of one coded block."""

    active: RemovalCurve
    """Branches that work for the sample's class are removed."""
    inactive: RemovalCurve
    """Branches that do not work for the sample's class are removed."""


@dataclass(frozen=True)
class Removal:
    """The removal curves of all coded blocks."""

    samples: int
    """Images that lost branches; under a limit of time a seeded subset."""
    accuracy: float
    """Accuracy of the whole network on them, nothing removed."""
    blocks: tuple[BlockRemoval, ...]
    """In the order of the network."""
    seed: int
    repeats: int

    @property
    def points(self) -> tuple[int, int]:
        """Points of the curves that were computed, and how many there are."""
        every = [
            accuracy
            for block in self.blocks
            for curve in (block.active, block.inactive)
            for accuracy in curve.accuracy
        ]
        return sum(accuracy is not None for accuracy in every), len(every)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        described: dict[str, Any] = describe(self)
        return described


def remove_branches(
    model: CodedResNeXt, loader: Loader, *, seed: int = 0, repeats: int = 5
) -> Removal:
    """Remove k random active or inactive branches of every sample in one block at a time, (10).

    Which branches are active is a matter of the sample's true class. In one repeat a sample loses
    its branches in one random order, so that the curve's points are nested; the orders depend on
    the seed and the sample's place in the loader, not on the batches.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`, in the same order always.
        seed: of the random orders, at least 0.
        repeats: random orders tried for every block, at least 1.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, targets are not class
            indices of the model, or a number is outside its range.
    """
    require_coded_blocks(model)
    check_draws(seed, repeats)
    observed = observe(model, loader)
    work = RemovalWork(model, observed, seed=seed, repeats=repeats)
    for segment in segments(model, loader, observed.gathered):
        for _ in work.steps(segment):
            pass
    return work.result()


def check_draws(seed: int, repeats: int) -> None:
    """Refuse a seed or a number of repeats outside its range."""
    for name, value, low in (("seed", seed, 0), ("repeats", repeats, 1)):
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")


class RemovalWork:
    """Removal in steps, each of them one point of one curve for some of the samples.

    Args:
        model: coded.
        observed: of the test images.
        seed, repeats: as `remove_branches`.
        budget: under a limit a seeded subset of the images loses branches, as many as are likely to
            give all blocks' last points in a quarter of the time that remains.
        ledger: finished steps, of this run and of an interrupted one.
        feature_bytes: memory for the inputs of the coded blocks.
    """

    def __init__(
        self,
        model: CodedResNeXt,
        observed: Observations,
        *,
        seed: int = 0,
        repeats: int = 5,
        budget: Budget | None = None,
        ledger: Ledger | None = None,
        feature_bytes: int = FEATURE_BYTES,
    ) -> None:
        self.model, self.observed, self.seed, self.repeats = model, observed, seed, repeats
        self.ledger = ledger or Ledger()
        self.feature_bytes = feature_bytes
        self.budget = budget or Budget()
        self.rows: Tensor | None = None
        self._counts = [
            {
                kind: _Counts(size)
                for kind, size in zip(
                    KINDS, (book.active, book.branches - book.active), strict=True
                )
            }
            for book in observed.codebooks
        ]

    def steps(self, segment: Segment) -> Iterator[None]:
        """Do the work for a segment; the most telling points come first.

        Under a limit of time there must be one segment.
        """
        if self.budget.is_limited:
            self.rows = self._subset(segment)
            segment = _part(segment, segment.where(self.rows))
        model = self.model
        with evaluating(model):
            example = segment.features[:1].to(next(model.parameters()).device)
            bytes_each = sum(x.nbytes for x in coded_inputs(model, example))
        room = max(1, self.feature_bytes // bytes_each)
        for start in range(0, len(segment.rows), room):
            part = _part(segment, torch.arange(start, min(start + room, len(segment.rows))))
            yield from self._part_steps(part)

    def result(self) -> Removal:
        """What the steps so far have found."""
        rows = torch.arange(self.observed.samples) if self.rows is None else self.rows
        correct = (self.observed.predictions == self.observed.targets)[rows]
        return Removal(
            samples=len(rows),
            accuracy=int(correct.sum()) / max(len(rows), 1),
            blocks=tuple(
                BlockRemoval(**{kind: counts[kind].curve(len(rows)) for kind in KINDS})
                for counts in self._counts
            ),
            seed=self.seed,
            repeats=self.repeats,
        )

    def _part_steps(self, part: Segment) -> Iterator[None]:
        inputs: list[Tensor] = []
        first = int(part.rows[0])
        for removed_rank in range(max(book.branches for book in self.observed.codebooks)):
            for index, counts in enumerate(self._counts):
                for kind in KINDS:
                    order = spread(counts[kind].size)
                    if removed_rank >= len(order):
                        continue
                    removed = order[removed_rank]
                    key = f"removal/{first}-{len(part.rows)}/{index}/{kind}/{removed}"
                    found = self.ledger.get(key)
                    if found is None:
                        if not inputs:
                            with evaluating(self.model):
                                inputs = self._inputs(part)
                        found = self._remove(part, inputs[index], index, kind, removed)
                        self.ledger.put(key, found)
                    counts[kind].add(removed, found)
                    yield

    def _inputs(self, part: Segment) -> list[Tensor]:
        size = self.observed.gathered.batch_size
        device = next(self.model.parameters()).device
        pieces = [coded_inputs(self.model, x.to(device)) for x in torch.split(part.features, size)]
        return [torch.cat(tensors) for tensors in zip(*pieces, strict=True)]

    def _remove(
        self, part: Segment, inputs: Tensor, index: int, kind: Kind, removed: int
    ) -> list[list[float]]:
        """Hits, and energy that is left, summed over the samples: a pair for every repeat."""
        observed = self.observed
        book = observed.codebooks[index]
        targets = observed.targets[part.rows]
        candidates = book.codewords[targets]
        if kind == "inactive":
            candidates = ~candidates
        energies = observed.energies[index][part.rows].double()
        found = []
        size = observed.gathered.batch_size
        rest: list[Tensor | None] = [None] * (len(observed.codebooks) - index - 1)
        # Everything removed leaves nothing to repeat.
        repeats = 1 if removed == self._counts[index][kind].size else self.repeats
        for repeat in range(repeats):
            # Of all samples: what one of them loses does not depend on which others do.
            generator = np.random.default_rng((self.seed, index, repeat))
            priorities = generator.random((observed.gathered.available, book.branches))
            mine = priorities[observed.gathered.positions[part.rows].numpy()]
            keep = removal_mask(candidates, mine, removed)
            hits = 0
            with evaluating(self.model):
                for start in range(0, len(part.rows), size):
                    some = slice(start, start + size)
                    masks = [keep[some].to(inputs.device), *rest]
                    said = resume(self.model, inputs[some], index, masks).argmax(1).cpu()
                    hits += int((said == targets[some]).sum())
            left = float((energies * keep).sum()) / book.branches
            found.append([hits, left])
        return found

    def _subset(self, segment: Segment) -> Tensor:
        """The rows that lose branches under a limit of time: a seeded draw, ascending."""
        blocks = len(self._counts)
        # Each block's last two points, each a pass through the blocks from there on.
        passes = 2 * sum((blocks - index) / blocks for index in range(blocks))
        each = max(passes * self.observed.gathered.seconds, 1e-9)
        # An interrupted run goes on with the subset that it had.
        count = self.ledger.get("removal/samples")
        if count is None:
            count = max(FEWEST_SAMPLES, int(self.budget.remaining / 4 / each))
            self.ledger.put("removal/samples", count)
        order = np.random.default_rng((self.seed, 1)).permutation(len(segment.rows))[:count]
        return segment.rows[np.sort(order)]


def spread(size: int) -> list[int]:
    """1 to `size`, the last first, then the middle, the quarters and so on."""
    order: list[int] = []
    pieces = 1
    while len(order) < size:
        for index in range(pieces, 0, -1):
            value = -(-size * index // pieces)
            if value not in order:
                order.append(value)
        pieces *= 2
    return order


def removal_mask(
    candidates: Tensor, priorities: np.ndarray[Any, np.dtype[np.float64]], removed: int
) -> Tensor:
    """A mask that takes some of each sample's candidate branches away.

    Args:
        candidates: boolean `[B, N]`, at least `removed` in every row.
        priorities: `[B, N]`, finite; branches of a lower one are removed earlier.
        removed: how many.

    Returns:
        Boolean `[B, N]`, true for the branches that are kept.
    """
    ordered = np.where(candidates.numpy(), priorities, np.inf)
    rank = torch.from_numpy(ordered.argsort(axis=1, kind="stable").argsort(axis=1))
    return rank >= removed


def _part(segment: Segment, places: Tensor) -> Segment:
    if len(places) == len(segment.rows):
        return segment
    return Segment(segment.rows[places], segment.features[places])


class _Counts:
    """Correct classifications and energies of one block and kind, by branches removed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums: list[list[list[float]] | None] = [None] * size

    def add(self, removed: int, found: list[list[float]]) -> None:
        """Sums of further samples, a pair for every repeat."""
        before = self.sums[removed - 1] or [[0.0, 0.0] for _ in found]
        self.sums[removed - 1] = [
            [hits + more, energy + further]
            for (hits, energy), (more, further) in zip(before, found, strict=True)
        ]

    def curve(self, samples: int) -> RemovalCurve:
        """The means and deviations of the shares of this many samples."""
        hits, left = (
            [_spread(sums, position, samples) for sums in self.sums] for position in (0, 1)
        )
        return RemovalCurve(
            removed=tuple(range(1, self.size + 1)),
            accuracy=tuple(mean for mean, _ in hits),
            deviation=tuple(deviation for _, deviation in hits),
            energy=tuple(mean for mean, _ in left),
            energy_deviation=tuple(deviation for _, deviation in left),
        )


def _spread(
    sums: list[list[float]] | None, position: int, samples: int
) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the repeats of one of the sums, as a share."""
    if sums is None:
        return None, None
    shares = [pair[position] / samples for pair in sums]
    return statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else 0.0
