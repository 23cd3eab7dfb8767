"""Early decoding: how well every coded block alone already knows the class, (9)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import EarlyExit, ExitScores, exit_macs
from coded_resnext.models.resnext import CodedResNeXt

from .observe import Observations, require_coded_blocks

Confusion = tuple[tuple[int, int, int], ...]
"""The cells of a confusion matrix that are not 0, in order: (class, class that is said, images)."""


@dataclass(frozen=True)
class Classification:
    """How a network, or one decoder, classifies; all numbers but counts are shares, 0 to 1."""

    accuracy: float
    """Share of the images whose class is said."""
    class_accuracy: tuple[float | None, ...]
    """The accuracy by true class; None for a class without images."""
    confusion: Confusion
    """(true class, said class, images), of those that occur."""

    @property
    def balanced_accuracy(self) -> float:
        """Returns the mean of the classes' accuracies, over those that have images."""
        shares = [share for share in self.class_accuracy if share is not None]
        return math.fsum(shares) / len(shares)


@dataclass(frozen=True)
class BlockDecoding(Classification):
    """Decoding one coded block, and how that compares with the network's final prediction."""

    agreement: float
    """Share of the images whose decoded class is the final prediction."""
    class_agreement: tuple[float | None, ...]
    """The agreement by true class; None for a class without images."""
    confusion_with_final: Confusion
    """(final prediction, decoded class, images), of those that occur."""


@dataclass(frozen=True)
class EarlyDecoding:
    """Decoding every coded block of a network."""

    samples: int
    """Images that were decoded."""
    accuracy: float
    """Share of the images that the whole network classifies correctly, 0 to 1."""
    blocks: tuple[BlockDecoding, ...]
    """The coded blocks, in order."""

    @property
    def block_accuracy(self) -> tuple[float, ...]:
        """Returns the share of images whose decoded class is the true one, by coded block."""
        return tuple(block.accuracy for block in self.blocks)

    @property
    def block_agreement(self) -> tuple[float, ...]:
        """Returns the share of images whose decoded class is the final one, by coded block."""
        return tuple(block.agreement for block in self.blocks)

    @classmethod
    def of(cls, observed: Observations) -> EarlyDecoding:
        """Decodes every coded block of an observed network; ValueError for a plain one."""
        require_coded_blocks(observed.codebooks)
        final, targets = observed.predictions, observed.targets
        classes = len(observed.class_names)
        blocks = []
        for decoded in observed.decoded:
            whole = classification(decoded, targets, classes)
            agreeing = decoded == final
            blocks.append(
                BlockDecoding(
                    accuracy=whole.accuracy,
                    class_accuracy=whole.class_accuracy,
                    confusion=whole.confusion,
                    agreement=int(agreeing.sum()) / len(targets),
                    class_agreement=_by_class(agreeing, targets, classes),
                    confusion_with_final=confusion(final, decoded, classes),
                )
            )
        return cls(len(targets), observed.accuracy, tuple(blocks))


def classification(said: Tensor, targets: Tensor, classes: int) -> Classification:
    """Compare said classes `[n]` with the true ones `[n]`."""
    correct = said == targets
    return Classification(
        accuracy=int(correct.sum()) / len(targets),
        class_accuracy=_by_class(correct, targets, classes),
        confusion=confusion(targets, said, classes),
    )


def confusion(rows: Tensor, columns: Tensor, classes: int) -> Confusion:
    """Count the pairs of classes that occur in two lists `[n]`, ascending."""
    cells, counts = torch.unique(rows * classes + columns, return_counts=True)
    return tuple(
        (cell // classes, cell % classes, count)
        for cell, count in zip(cells.tolist(), counts.tolist(), strict=True)
    )


def _by_class(hits: Tensor, targets: Tensor, classes: int) -> tuple[float | None, ...]:
    """Returns the share of hits by class, None for a class without images."""
    all_ = targets.bincount(minlength=classes).tolist()
    right = targets[hits].bincount(minlength=classes).tolist()
    return tuple(hit / count if count else None for hit, count in zip(right, all_, strict=True))


# Steps of the margin; equal ones, of a small data set, are taken once.
STEPS = 48


@dataclass(frozen=True)
class ExitPoint:
    """The effect on the test images of an early exit at one margin for all coded blocks."""

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
        """Returns accuracy and cost of early exit, from margin 0, where all leave at once, to none.

        The margins between part those that occur into equal shares. Every point is what
        `predict_early(model, images, EarlyExit.at_margin(model, margin))` would give.

        Args:
            observed: what `observe` returned for the network.
            model: the network.

        Raises:
            ValueError: the network has no coded block.
        """
        require_coded_blocks(observed.codebooks)
        scores = scores_of(observed)
        height, width = observed.image_size
        costs = torch.tensor(exit_macs(model, height, width), dtype=torch.float64)
        criteria = [EarlyExit.at_margin(model, margin) for margin in _margins(scores)]
        criteria.append(EarlyExit((None,) * len(model.coded_blocks)))
        return cls(
            samples=observed.samples,
            network_macs=network_cost(model, (height, width)).macs,
            points=tuple(_point(scores, criterion, costs) for criterion in criteria),
        )


def scores_of(observed: Observations) -> ExitScores:
    """The numbers of the images that early exit needs: decoded classes, margins, true classes."""
    return ExitScores(
        decoded=torch.stack(observed.decoded, 1),
        margins=torch.stack(observed.margins, 1),
        final=observed.predictions,
        targets=observed.targets,
    )


def _margins(scores: ExitScores) -> list[float]:
    """0, and margins that part those that occur into shares of one size, ascending, each once.

    They lie halfway between two that occur, so that rounding moves no image to the other side.
    """
    ordered = torch.cat([torch.zeros(1), scores.margins.flatten()]).double().sort().values
    shares = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    places = (shares * (len(ordered) - 1)).round().long().clamp(min=1)
    below, above = ordered[places - 1], ordered[places]
    return sorted({0.0, *((below + above) / 2)[above > below].tolist()})


def _point(scores: ExitScores, criterion: EarlyExit, costs: Tensor) -> ExitPoint:
    exits = scores.exits(criterion)
    return ExitPoint(
        margin=criterion.margins[0],
        accuracy=scores.accuracy(criterion),
        macs=float(costs[exits].mean()),
        exits=tuple(exits.bincount(minlength=len(costs)).tolist()),
    )
