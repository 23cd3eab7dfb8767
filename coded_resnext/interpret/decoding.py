"""Early decoding, (9): how well every coded block alone already knows the class.

Of all test images it counts the correct ones and what an early exit would cost. `Samples` and
`trace` follow single images through a network: what every block does, says and decides.

Letters: n chosen images, N branches of a block, K classes, L coded blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import EarlyExit, ExitScores, exit_macs
from coded_resnext.models.loss import check_results, decode, not_finite
from coded_resnext.models.resnext import CodedResNeXt, own_network

from .observe import Observations, evaluating, normalized, require_at_least, require_coded_blocks

Confusion = tuple[tuple[int, int, int], ...]
"""The cells of a confusion matrix that are not 0, in order: (class, class that is said, images)."""
# Steps of the margin; equal ones, of a small data set, are taken once.
STEPS = 48
# Images of a data set with few classes; one of each class where there are more, up to the most.
CHOSEN, MOST_CHOSEN = 240, 1000
# Of these, one in so many is for images that the network or a decoder misreads.
MISREAD_SHARE = 4
# Classes that are listed for every block: the nearest codewords.
NEAREST = 3
SHOWN = 3


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
    """Compares said classes `[n]` with the true ones `[n]`."""
    correct = said == targets
    return Classification(
        accuracy=int(correct.sum()) / len(targets),
        class_accuracy=_by_class(correct, targets, classes),
        confusion=confusion(targets, said, classes),
    )


def confusion(rows: Tensor, columns: Tensor, classes: int) -> Confusion:
    """Counts the pairs of classes that occur in two lists `[n]`, ascending."""
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
    """Returns the numbers of the images that early exit needs: decoded classes, margins, true
    classes."""
    return ExitScores(
        decoded=torch.stack(observed.decoded, 1),
        margins=torch.stack(observed.margins, 1),
        final=observed.predictions,
        targets=observed.targets,
    )


def _margins(scores: ExitScores) -> list[float]:
    """Returns 0, and margins that part those that occur into equal shares, ascending.

    They lie halfway between two that occur, so that rounding moves no image to the other side.
    """
    ordered = torch.cat([torch.zeros(1), scores.margins.flatten()]).double().sort().values
    shares = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    positions = (shares * (len(ordered) - 1)).round().long().clamp(min=1)
    below, above = ordered[positions - 1], ordered[positions]
    return sorted({0.0, *((below + above) / 2)[above > below].tolist()})


def _point(scores: ExitScores, criterion: EarlyExit, costs: Tensor) -> ExitPoint:
    exits = scores.exits(criterion)
    return ExitPoint(
        margin=criterion.margins[0],
        accuracy=scores.accuracy(criterion),
        macs=float(costs[exits].mean()),
        exits=tuple(exits.bincount(minlength=len(costs)).tolist()),
    )


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """One coded block and the chosen images."""

    energies: Tensor
    """`r Ebar`, (4): on the scale of a codeword, with rows that sum to A; `[n, N]`."""
    decoded: tuple[int, ...]
    """The class whose codeword is nearest, (9)."""
    margins: tuple[float, ...]
    """Margin of the decoded class, as early exit measures it."""
    nearest: tuple[tuple[int, ...], ...]
    """For every image the three classes of the nearest codewords, nearest first."""
    shares: Tensor
    """Share of the energy in the branches of these classes, 0 to 1; `[n, 3]`."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Chosen test images, ordered by true class and position."""

    positions: tuple[int, ...]
    """Place of every chosen image in the loader, counted from 0."""
    targets: tuple[int, ...]
    """True classes."""
    predictions: tuple[int, ...]
    """Classes of the classifier."""
    probabilities: tuple[float, ...]
    """Softmax of the predicted class."""
    settled: tuple[int, ...]
    """The coded block, counted from 0, from which on every decoder says what the classifier says;
    L where the last decoder says something else."""
    blocks: tuple[SampleBlock, ...]
    """The coded blocks, in order."""
    seed: int
    """Seed of the choice."""

    @classmethod
    def of(cls, observed: Observations, *, limit: int | None = None, seed: int = 0) -> Samples:
        """Follows some of the test images: the misread ones first, then as many of every class.

        A quarter of the images are those that the classifier misreads and, after them, those that
        an early decoder reads otherwise than the classifier. The rest are of all classes by turns.

        Args:
            observed: what `observe` returned for a coded network.
            limit: images to choose at most, at least 1; by default 240, or one of every class
                where there are more, up to 1000.
            seed: decides the choice; at least 0.

        Raises:
            ValueError: the network has no coded block, or a number is outside its range.
        """
        require_coded_blocks(observed.codebooks)
        require_at_least(1, limit=limit)
        require_at_least(0, seed=seed)
        if limit is None:
            limit = min(max(CHOSEN, len(observed.class_names)), MOST_CHOSEN)
        scores = scores_of(observed)
        chosen = choose(scores, limit, seed)
        blocks = []
        for index, book in enumerate(observed.codebooks):
            energies = observed.energies[index][chosen]
            # As in decoding: of equal scores the lowest class.
            order = (energies @ book.codewords.to(energies.dtype).T).sort(
                dim=1, descending=True, stable=True
            )
            blocks.append(
                SampleBlock(
                    energies=book.ratio * energies,
                    decoded=tuple(scores.decoded[chosen, index].tolist()),
                    margins=tuple(scores.margins[chosen, index].tolist()),
                    nearest=tuple(map(tuple, order.indices[:, :NEAREST].tolist())),
                    shares=order.values[:, :NEAREST] / book.branches,
                )
            )
        return cls(
            positions=tuple(chosen.tolist()),
            targets=tuple(scores.targets[chosen].tolist()),
            predictions=tuple(scores.final[chosen].tolist()),
            probabilities=tuple(observed.confidences[chosen].tolist()),
            settled=tuple(_settled(scores.decoded[chosen], scores.final[chosen]).tolist()),
            blocks=tuple(blocks),
            seed=seed,
        )

    @property
    def scores(self) -> ExitScores:
        """Returns the numbers of the images that early exit needs."""
        return ExitScores(
            decoded=torch.tensor([block.decoded for block in self.blocks]).T,
            margins=torch.tensor([block.margins for block in self.blocks]).T,
            final=torch.tensor(self.predictions),
            targets=torch.tensor(self.targets),
        )


def choose(scores: ExitScores, limit: int, seed: int) -> Tensor:
    """Returns which images to follow, by true class and position; `[n]` with `n <= limit`."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(scores.targets)))
    wrong = scores.final != scores.targets
    wavering = (scores.decoded != scores.final[:, None]).any(1)
    misread = [*order[wrong[order]].tolist(), *order[(wavering & ~wrong)[order]].tolist()]
    picked = dict.fromkeys(misread[: max(limit // MISREAD_SHARE, 1)])
    waiting: dict[int, list[int]] = {}
    targets = scores.targets.tolist()
    for row in order.tolist():
        if row not in picked:
            waiting.setdefault(targets[row], []).append(row)
    # One of every class in turn: round r takes the r-th of each.
    rounds = sorted(
        (turn, target, row) for target, rows in waiting.items() for turn, row in enumerate(rows)
    )
    picked |= dict.fromkeys(row for _, _, row in rounds[: limit - len(picked)])
    return torch.tensor(sorted(picked, key=lambda row: (targets[row], row)))


def _settled(decoded: Tensor, final: Tensor) -> Tensor:
    """Returns the block from which on all of `[n, L]` agree with `[n]`."""
    agree = (decoded == final[:, None]).flip(1).long()
    return decoded.shape[1] - agree.cumprod(1).sum(1)


@dataclass(frozen=True)
class BlockTrace:
    """One coded block and one image."""

    energies: tuple[float, ...]
    """`r Ebar` by branch, (4): on the scale of a codeword, with the sum A."""
    distances: tuple[float, ...]
    """Euclidean distance of these energies to the codeword of every class, (9)."""
    prediction: int
    """The class whose codeword is nearest."""
    path: tuple[int, ...]
    """The A branches with the most energy, ascending."""


@dataclass(frozen=True)
class Trace:
    """One image on its way through a network; prints as a table."""

    class_names: tuple[str, ...]
    blocks: tuple[BlockTrace, ...]
    """The coded blocks, in order."""
    logits: tuple[float, ...]
    prediction: int
    """The class of the classifier."""

    def __str__(self) -> str:
        lines = []
        for number, block in enumerate(self.blocks, 1):
            energies = " ".join(f"{energy:.2f}" for energy in block.energies)
            order = sorted(range(len(self.class_names)), key=block.distances.__getitem__)
            near = ", ".join(
                f"{self.class_names[index]} {block.distances[index]:.2f}" for index in order[:SHOWN]
            )
            lines += [f"block {number}: energies {energies}", f"         nearest {near}"]
        return "\n".join([*lines, f"classifier: {self.class_names[self.prediction]}"])


def trace(model: CodedResNeXt, x: Tensor) -> Trace:
    """Follows one image through the network.

    Args:
        model: with at least one coded block; its mode is left as found.
        x: `[C, H, W]` or `[1, C, H, W]`.

    Raises:
        ValueError: the network has no coded block, `x` is not one image, or results are not finite.
    """
    model = own_network(model)
    require_coded_blocks(model.coded_blocks)
    if isinstance(model.head, nn.Identity):
        raise ValueError("head: expected the classifier, which names the class; got none")
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or len(batch) != 1:
        raise ValueError(f"x: expected one image [C, H, W] or [1, C, H, W], got {list(x.shape)}")
    with evaluating(model):
        logits, all_energies = model(batch.to(next(model.parameters())), return_energies=True)
    check_results(model, not_finite(logits, all_energies))
    blocks = []
    for block, energies in zip(model.coded_blocks, all_energies, strict=True):
        book = block.codebook
        assert book is not None
        energies = energies if block.normalize else normalized(energies)
        scaled = book.ratio * energies[0]
        distances = (scaled - block.codewords.to(scaled.dtype)).square().sum(1).sqrt()
        blocks.append(
            BlockTrace(
                energies=tuple(scaled.tolist()),
                distances=tuple(distances.tolist()),
                prediction=int(decode(energies, book)),
                path=strongest(energies[0], book.active),
            )
        )
    return Trace(
        model.class_names, tuple(blocks), tuple(logits[0].tolist()), int(logits[0].argmax())
    )


def strongest(energies: Tensor, active: int) -> tuple[int, ...]:
    """Returns the `active` branches with the most energy of `[N]`, ascending; of equal ones the
    lowest."""
    order = torch.sort(energies, descending=True, stable=True).indices
    return tuple(sorted(order[:active].tolist()))
