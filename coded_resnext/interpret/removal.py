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
from numpy.typing import NDArray
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.models.resnext import CodedResNeXt

from .observe import (
    Item,
    Loader,
    Part,
    coded_walk,
    normalized,
    require_at_least,
    require_coded_blocks,
    resume,
    stream,
)

Kind = Literal["active", "inactive"]
KINDS: tuple[Kind, Kind] = ("active", "inactive")


@dataclass(frozen=True)
class RemovalCurve:
    """Accuracy and energy against the number of branches that every sample loses in one block.

    Numbers are means over the repeats with their standard deviations (n - 1); a deviation is 0
    where there was one repeat, and when all branches of the kind are removed, which leaves nothing
    to chance.
    """

    removed: tuple[int, ...]
    """Numbers of removed branches: 1 up to all branches of the kind."""
    accuracy: tuple[float, ...]
    """Mean accuracy for each of these numbers, as a share, 0 to 1."""
    deviation: tuple[float, ...]
    """Standard deviation of the accuracy over the repeats."""
    energy: tuple[float, ...]
    """Mean share of the block's former energy that the branches left have, 0 to 1."""
    energy_deviation: tuple[float, ...]
    """Standard deviation of the energy over the repeats."""


@dataclass(frozen=True)
class BlockRemoval:
    """Both curves of one coded block."""

    active: RemovalCurve
    """The curve when branches that work for the sample's class are removed."""
    inactive: RemovalCurve
    """The curve when branches that do not work for the sample's class are removed."""


@dataclass(frozen=True)
class Removal:
    """The removal curves of all coded blocks."""

    samples: int
    """Images that lost branches: all test images, or a seeded draw of them."""
    accuracy: float
    """Accuracy of the whole network on them, nothing removed."""
    blocks: tuple[BlockRemoval, ...]
    """The curves of the coded blocks, in the order of the network."""
    seed: int
    """Seed of the orders in which branches were removed."""
    repeats: int
    """Random orders that were tried for every block."""


def remove_branches(
    model: CodedResNeXt,
    loader: Loader,
    *,
    rows: Tensor | None = None,
    seed: int = 0,
    repeats: int = 5,
) -> Removal:
    """Removes k random (in)active branches of every sample in one block at a time, (10).

    Which branches are active is a matter of the sample's true class. In one repeat a sample loses
    its branches in one random order, so that the curve's points are nested; the orders depend on
    the seed and the sample's position in the loader, neither on batches nor on other samples.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        rows: positions in the loader of the images that lose branches, ascending; None for all.
        seed: decides the random orders; at least 0.
        repeats: random orders tried for every block, at least 1.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, targets are not class
            indices of the model, or a number is outside its range.
    """
    remover = Remover(model, seed, repeats)
    stream(model, loader, "removal of branches", [(remover.add, rows)])
    return remover.result()


class Remover:
    """Gathers what `remove_branches` returns; arguments as for it."""

    def __init__(self, model: CodedResNeXt, seed: int, repeats: int) -> None:
        require_coded_blocks(model.coded_blocks)
        require_at_least(0, seed=seed)
        require_at_least(1, repeats=repeats)
        self.model, self.seed, self.repeats = model, seed, repeats
        # By block and kind, for every number of removed branches and repeat: correct predictions,
        # and the energy that is left, summed over the samples.
        self._sums = [
            {kind: np.zeros((size, repeats, 2)) for kind, size in _kinds(book)}
            for book in model.codebooks
        ]
        self._orders = [
            [np.random.default_rng((seed, index, repeat)) for repeat in range(repeats)]
            for index in range(len(model.codebooks))
        ]
        self._end = self._samples = self._correct = 0

    def add(self, part: Part) -> None:
        """Takes the next images."""
        model, targets, device = self.model, part.targets, part.features.device
        # An order is drawn for every image of the loader, whether it loses branches or not.
        start, self._end = self._end, int(part.positions[-1]) + 1
        inputs, all_energies, logits = coded_walk(model, part.features)
        self._samples += len(targets)
        self._correct += int((logits.argmax(1).cpu() == targets).sum())
        for index, block in enumerate(model.coded_blocks):
            book = model.codebooks[index]
            energies = all_energies[index].cpu()
            energies = energies if block.normalize else normalized(energies)
            energies = energies.double() / book.branches
            works = book.codewords[targets]
            later = [None] * (len(inputs) - index - 1)
            points, masks = [], []
            for repeat, generator in enumerate(self._orders[index]):
                drawn = generator.random((self._end - start, book.branches))
                priorities = drawn[(part.positions - start).numpy()]
                for kind, removed in _points(book, repeat):
                    keep = removal_mask(works == (kind == "active"), priorities, removed)
                    points.append((kind, removed - 1, repeat))
                    masks.append(keep)
            # Of few images several masks are tried in one pass.
            together = max(1, part.at_a_time // len(targets))
            for some, keeps in zip(_split(points, together), _split(masks, together), strict=True):
                x = inputs[index]
                x = x.expand(len(keeps), *x.shape).flatten(0, 1) if len(keeps) > 1 else x
                logits = resume(model, x, index, [torch.cat(keeps).to(device), *later])
                said = logits.argmax(1).cpu().view(len(keeps), -1)
                for (kind, point, repeat), keep, predictions in zip(some, keeps, said, strict=True):
                    hits = int((predictions == targets).sum())
                    left = float((energies * keep).sum())
                    self._sums[index][kind][point, repeat] += (hits, left)

    def result(self) -> Removal:
        """Returns the curves."""
        return Removal(
            samples=self._samples,
            accuracy=self._correct / self._samples,
            blocks=tuple(
                BlockRemoval(
                    **{kind: _curve(counts / self._samples) for kind, counts in of_block.items()}
                )
                for of_block in self._sums
            ),
            seed=self.seed,
            repeats=self.repeats,
        )


def _split(items: list[Item], count: int) -> list[list[Item]]:
    """Cuts a list into parts of a length, but for the last."""
    return [items[start : start + count] for start in range(0, len(items), count)]


def removal_passes(book: Codebook, repeats: int) -> int:
    """Returns how often an image goes on from a block of this codebook, to lose branches there."""
    return sum(1 for repeat in range(repeats) for _ in _points(book, repeat))


def _kinds(book: Codebook) -> tuple[tuple[Kind, int], ...]:
    """Returns both kinds of branches with how many of them every sample has."""
    return ("active", book.active), ("inactive", book.branches - book.active)


def _points(book: Codebook, repeat: int) -> Iterator[tuple[Kind, int]]:
    """Yields the kinds and numbers of branches that are removed in a repeat."""
    for kind, size in _kinds(book):
        # Where all are removed there is nothing to repeat.
        for removed in range(1, size + (repeat == 0)):
            yield kind, removed


def _curve(shares: NDArray[np.float64]) -> RemovalCurve:
    """Returns the curve of `[removed, repeats, 2]` shares of correct predictions and of energy."""
    repeated = [*shares[:-1], shares[-1, :1]]
    hits = [_mean_and_deviation(point[:, 0]) for point in repeated]
    left = [_mean_and_deviation(point[:, 1]) for point in repeated]
    return RemovalCurve(
        removed=tuple(range(1, len(shares) + 1)),
        accuracy=tuple(mean for mean, _ in hits),
        deviation=tuple(deviation for _, deviation in hits),
        energy=tuple(mean for mean, _ in left),
        energy_deviation=tuple(deviation for _, deviation in left),
    )


def _mean_and_deviation(values: NDArray[np.float64]) -> tuple[float, float]:
    numbers = values.tolist()
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def removal_mask(
    candidates: Tensor, priorities: np.ndarray[Any, np.dtype[np.float64]], removed: int
) -> Tensor:
    """Returns a mask that takes some of each sample's candidate branches away.

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
