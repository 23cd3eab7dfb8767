"""Single test images on their way through a network: what every block does, says and decides.

Letters: n chosen images, N branches of a block, K classes, L coded blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from coded_resnext.deploy.early_exit import ExitScores
from coded_resnext.models.loss import check_results, decode, not_finite
from coded_resnext.models.resnext import CodedResNeXt, own_network

from .decoding import scores_of
from .observe import Observations, evaluating, normalized, require_at_least, require_coded_blocks

# Images of a data set with few classes; one of each class where there are more, up to the most.
CHOSEN, MOST_CHOSEN = 240, 1000
# Of these, one in so many places is for images that the network or a decoder misreads.
MISREAD_SHARE = 4
# Classes that are listed for every block: the nearest codewords.
NEAREST = 3


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

        A quarter of the places is for images that the classifier misreads and, after them, those
        that an early decoder reads otherwise than the classifier. What is left goes around the
        classes.

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
    """Returns which images to follow, by true class and place; `[n]` with `n <= limit`."""
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


SHOWN = 3


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
    """The `active` branches with the most energy of `[N]`, ascending; of equal ones the lowest."""
    order = torch.sort(energies, descending=True, stable=True).indices
    return tuple(sorted(order[:active].tolist()))
