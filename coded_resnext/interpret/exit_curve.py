"""Early exit: accuracy against multiply-accumulates, over the margin at which images may leave.

Letters: n samples, L coded blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost import network_cost
from ..early_exit import EarlyExit, exit_macs, read_class
from ..exit_calibration import ExitScores
from ..models import CodedResNeXt
from .observing import Observations, observe
from .records import describe
from .running import Loader, require_coded_blocks

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

    @classmethod
    def of(cls, observed: Observations, model: CodedResNeXt) -> ExitCurve:
        """From what was observed of a coded network."""
        scores = scores_of(observed)
        height, width = observed.gathered.image_size
        costs = torch.tensor(exit_macs(model, height, width), dtype=torch.float64)
        criteria = [EarlyExit.at_margin(model, margin) for margin in _margins(scores)]
        criteria.append(EarlyExit((None,) * len(model.coded_blocks)))
        return cls(
            samples=observed.samples,
            network_macs=network_cost(model, height).macs,
            points=tuple(_point(scores, criterion, costs) for criterion in criteria),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        described: dict[str, Any] = describe(self)
        return described


def exit_curve(model: CodedResNeXt, loader: Loader) -> ExitCurve:
    """Accuracy and cost of early exit for margins from 0, where all leave at once, to none.

    The margins between part those that occur into equal shares. Every point is what
    `predict_early(model, images, EarlyExit.at_margin(model, margin))` would give.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, or targets are not
            class indices of the model.
    """
    require_coded_blocks(model)
    return ExitCurve.of(observe(model, loader), model)


def scores_of(observed: Observations) -> ExitScores:
    """What early exit needs to know of the images: readings, their margins, classes."""
    read = [
        read_class(energies, book.codewords)
        for energies, book in zip(observed.energies, observed.codebooks, strict=True)
    ]
    return ExitScores(
        decoded=torch.stack([classes for classes, _ in read], 1),
        margins=torch.stack([margins for _, margins in read], 1),
        final=observed.predictions,
        targets=observed.targets,
    )


def _margins(scores: ExitScores) -> list[float]:
    """0, and margins that part those that occur into shares of one size, ascending, each once.

    They lie halfway between two that occur, so that rounding moves no image to the other side.
    """
    found = torch.cat([torch.zeros(1), scores.margins.flatten()]).double().sort().values
    shares = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    places = (shares * (len(found) - 1)).round().long().clamp(min=1)
    below, above = found[places - 1], found[places]
    return sorted({0.0, *((below + above) / 2)[above > below].tolist()})


def _point(scores: ExitScores, criterion: EarlyExit, costs: Tensor) -> ExitPoint:
    exits = scores.exits(criterion)
    return ExitPoint(
        margin=criterion.margins[0],
        accuracy=scores.accuracy(criterion),
        macs=float(costs[exits].mean()),
        exits=tuple(exits.bincount(minlength=len(costs)).tolist()),
    )
