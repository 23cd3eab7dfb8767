"""Early exit: accuracy against multiply-accumulates, over the margin at which images may leave.

Letters: n samples, L coded blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost import network_cost
from ..early_exit import EarlyExit, exit_macs
from ..exit_calibration import ExitScores, exit_scores
from ..models import CodedResNeXt
from .running import Loader, batches, evaluating, require_coded_blocks

# Steps of the margin; equal ones, of a small data set, are taken once.
STEPS = 48


@dataclass(frozen=True)
class ExitPoint:
    """What an early exit at one margin for all coded blocks does to the test images."""

    margin: float | None
    """Images with at least this margin leave; None is the network without early exit."""
    accuracy: float
    """Share of correct predictions, 0 to 1."""
    macs: float
    """Mean multiply-accumulates of an image, those of decoding included."""
    exits: tuple[int, ...]
    """Images that leave behind each coded block and, last, at the classifier."""


@dataclass(frozen=True)
class ExitCurve:
    """Accuracy against cost; the margin ascends, and the last point is the whole network."""

    samples: int
    network_macs: int
    """Multiply-accumulates of the network for one image, when nothing is decoded."""
    points: tuple[ExitPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, by columns."""
        return {
            "samples": self.samples,
            "network_macs": self.network_macs,
            "margins": [point.margin for point in self.points],
            "accuracy": [point.accuracy for point in self.points],
            "macs": [point.macs for point in self.points],
            "exits": [list(point.exits) for point in self.points],
        }

    @classmethod
    def from_dict(cls, data: Any) -> ExitCurve:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: it describes no curve.
        """
        try:
            columns = (data["margins"], data["accuracy"], data["macs"], data["exits"])
            points = tuple(
                ExitPoint(margin, accuracy, macs, tuple(exits))
                for margin, accuracy, macs, exits in zip(*columns, strict=True)
            )
            return cls(data["samples"], data["network_macs"], points)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"exit curve: expected the columns that to_dict writes, got {error!r}"
            ) from error


def exit_curve(model: CodedResNeXt, loader: Loader) -> ExitCurve:
    """Accuracy and cost of early exit for margins from 0, where all leave at once, to none.

    The margins between are quantiles of those that occur. Every point is what
    `predict_early(model, images, EarlyExit.at_margin(model, margin))` would give.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of square images `[B, C, H, W]` of one size and class indices `[B]`.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, images are of several
            sizes or not square, or targets are not class indices of the model.
    """
    require_coded_blocks(model)
    sizes: set[tuple[int, int]] = set()

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in batches(model, loader, "early exit"):
            sizes.add((images.shape[2], images.shape[3]))
            yield images, targets

    with evaluating(model):
        scores = exit_scores(model, seen())
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        raise ValueError(f"images: expected square ones of one size, got {sorted(sizes)}")
    ((size, _),) = sizes
    costs = torch.tensor(exit_macs(model, size, size), dtype=torch.float64)
    blocks = len(model.coded_blocks)
    criteria = [EarlyExit.at_margin(model, margin) for margin in _margins(scores)]
    criteria.append(EarlyExit((None,) * blocks))
    return ExitCurve(
        samples=len(scores.targets),
        network_macs=network_cost(model, size).macs,
        points=tuple(_point(scores, criterion, costs) for criterion in criteria),
    )


def _margins(scores: ExitScores) -> list[float]:
    """0 and quantiles of the margins that occur, ascending, each once."""
    shares = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    found = scores.margins.double().flatten().sort().values
    chosen = found[(shares * (len(found) - 1)).round().long()]
    return sorted({0.0, *chosen.tolist()})


def _point(scores: ExitScores, criterion: EarlyExit, costs: Tensor) -> ExitPoint:
    exits = scores.exits(criterion)
    return ExitPoint(
        margin=criterion.margins[0],
        accuracy=scores.accuracy(criterion),
        macs=float(costs[exits].mean()),
        exits=tuple(exits.bincount(minlength=len(costs)).tolist()),
    )
