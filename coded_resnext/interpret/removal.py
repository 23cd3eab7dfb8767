"""Removing branches: what a network loses without the branches of a class, and without others.

Letters as in docs/math.md: B samples, N branches, A of them active for each class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..models import CodedResNeXt
from .running import Loader, batches, block_inputs, evaluating, require_coded_blocks, resume

Kind = Literal["active", "inactive"]
KINDS: tuple[Kind, Kind] = ("active", "inactive")


@dataclass(frozen=True)
class RemovalCurve:
    """Accuracy against the number of branches that every sample loses in one block."""

    removed: tuple[int, ...]
    """1 up to all branches of the kind."""
    accuracy: tuple[float, ...]
    """Mean over the repeats, as a share, 0 to 1."""
    deviation: tuple[float, ...]
    """Standard deviation over the repeats (n - 1); 0 when all branches of the kind are removed,
    which leaves nothing to chance, and where there was one repeat."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "removed": list(self.removed),
            "accuracy": list(self.accuracy),
            "deviation": list(self.deviation),
        }


@dataclass(frozen=True)
class BlockRemoval:
    """Both curves of one coded block."""

    active: RemovalCurve
    """Branches that work for the sample's class are removed."""
    inactive: RemovalCurve
    """Branches that do not work for the sample's class are removed."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {"active": self.active.to_dict(), "inactive": self.inactive.to_dict()}


@dataclass(frozen=True)
class Removal:
    """The removal curves of all coded blocks."""

    samples: int
    accuracy: float
    """Accuracy of the whole network, nothing removed."""
    blocks: tuple[BlockRemoval, ...]
    """In the order of the network."""
    seed: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "samples": self.samples,
            "accuracy": self.accuracy,
            "blocks": [block.to_dict() for block in self.blocks],
            "seed": self.seed,
            "repeats": self.repeats,
        }


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
    for name, value, low in (("seed", seed, 0), ("repeats", repeats, 1)):
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    codebooks = model.codebooks
    # One generator a block and repeat, so that the orders do not depend on the batch size.
    generators = [
        [np.random.default_rng((seed, index, repeat)) for repeat in range(repeats)]
        for index in range(len(codebooks))
    ]
    correct = [_Counts(book.active, book.branches - book.active, repeats) for book in codebooks]
    samples = final = 0
    with evaluating(model):
        for images, targets in batches(model, loader, "removing branches"):
            inputs, logits = block_inputs(model, images)
            samples += len(targets)
            final += int((logits.argmax(1) == targets).sum())
            for index, codebook in enumerate(codebooks):
                rest = [None] * (len(codebooks) - index - 1)
                active = codebook.codewords[targets.cpu()]
                for repeat, generator in enumerate(generators[index]):
                    priorities = generator.random(active.shape)
                    for kind, removed, keep in removal_masks(active, priorities):
                        if repeat > 0 and removed == correct[index].largest[kind]:
                            continue
                        masks = [keep.to(images.device), *rest]
                        logits = resume(model, inputs[index], index, masks)
                        hits = int((logits.argmax(1) == targets).sum())
                        correct[index].hits[kind][removed - 1][repeat] += hits
    return Removal(
        samples=samples,
        accuracy=final / samples,
        blocks=tuple(
            BlockRemoval(**{kind: counts.curve(kind, samples) for kind in KINDS})
            for counts in correct
        ),
        seed=seed,
        repeats=repeats,
    )


def removal_masks(
    active: Tensor, priorities: np.ndarray[Any, np.dtype[np.float64]]
) -> Iterator[tuple[Kind, int, Tensor]]:
    """Masks that take away 1, 2, .. and at last all active, then inactive branches of samples.

    Args:
        active: boolean `[B, N]`, equally many in every row.
        priorities: `[B, N]`, finite; branches of a lower one are removed earlier.

    Yields:
        The kind, the number of branches removed, and the boolean mask `[B, N]` of those kept.
    """
    for kind, candidates in zip(KINDS, (active, ~active), strict=True):
        ordered = np.where(candidates.numpy(), priorities, np.inf)
        rank = torch.from_numpy(ordered.argsort(axis=1, kind="stable").argsort(axis=1))
        for removed in range(1, int(candidates[0].sum()) + 1):
            yield kind, removed, rank >= removed


class _Counts:
    """Correct classifications of one block, by kind, number of branches removed and repeat."""

    def __init__(self, active: int, inactive: int, repeats: int) -> None:
        self.largest: dict[Kind, int] = {"active": active, "inactive": inactive}
        self.hits: dict[Kind, list[list[int]]] = {
            # Everything removed leaves nothing to repeat.
            kind: [[0] * (repeats if k < count else 1) for k in range(1, count + 1)]
            for kind, count in self.largest.items()
        }

    def curve(self, kind: Kind, samples: int) -> RemovalCurve:
        shares = [[hits / samples for hits in repeats] for repeats in self.hits[kind]]
        return RemovalCurve(
            removed=tuple(range(1, len(shares) + 1)),
            accuracy=tuple(math.fsum(values) / len(values) for values in shares),
            deviation=tuple(map(_deviation, shares)),
        )


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
