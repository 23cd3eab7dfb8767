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
    DrawnImages,
    Loader,
    Observations,
    batches,
    coded_inputs,
    evaluating,
    require_at_least,
    require_coded_blocks,
    require_same_order,
    resume,
    trunk,
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
    observed: Observations,
    *,
    rows: Tensor | None = None,
    seed: int = 0,
    repeats: int = 5,
) -> Removal:
    """Remove k random active or inactive branches of every sample in one block at a time, (10).

    Which branches are active is a matter of the sample's true class. In one repeat a sample loses
    its branches in one random order, so that the curve's points are nested; the orders depend on
    the seed and the sample's place in the loader, neither on the batches nor on the other samples.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`, in the same order always.
        observed: what `observe` returned for this network and this loader.
        rows: places in the loader of the images that lose branches, ascending; None for all.
        seed: decides the random orders; at least 0.
        repeats: random orders tried for every block, at least 1.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, targets are not class
            indices of the model, its images are not those of `observed` in their order, or a
            number is outside its range.
    """
    require_coded_blocks(model.coded_blocks)
    require_at_least(0, seed=seed)
    require_at_least(1, repeats=repeats)
    if rows is None:
        rows = torch.arange(observed.samples)
    else:
        loader = DrawnImages(loader, rows)
    # By block and kind, for every number of removed branches and repeat: correct predictions, and
    # the energy that is left, summed over the samples.
    sums = [
        {kind: np.zeros((size, repeats, 2)) for kind, size in _kinds(book)}
        for book in observed.codebooks
    ]
    orders = [
        [np.random.default_rng((seed, index, repeat)) for repeat in range(repeats)]
        for index in range(len(observed.codebooks))
    ]
    end = done = 0
    with evaluating(model):
        for images, of_batch in batches(model, loader, "removal of branches"):
            batch = rows[done : done + len(images)]
            done += len(images)
            require_same_order(of_batch, observed.targets[batch])
            # An order is drawn for every image of the loader, whether it loses branches or not.
            start, end = end, int(batch[-1]) + 1
            inputs = coded_inputs(model, trunk(model, images))
            targets = observed.targets[batch]
            for index, book in enumerate(observed.codebooks):
                energies = observed.energies[index][batch].double() / book.branches
                works = book.codewords[targets]
                later = [None] * (len(inputs) - index - 1)
                for repeat, generator in enumerate(orders[index]):
                    priorities = generator.random((end - start, book.branches))[
                        (batch - start).numpy()
                    ]
                    for kind, removed in _points(book, repeat):
                        keep = removal_mask(works == (kind == "active"), priorities, removed)
                        masks = [keep.to(images.device), *later]
                        predictions = resume(model, inputs[index], index, masks).argmax(1).cpu()
                        hits = int((predictions == targets).sum())
                        left = float((energies * keep).sum())
                        sums[index][kind][removed - 1, repeat] += (hits, left)
    return Removal(
        samples=len(rows),
        accuracy=int((observed.predictions == observed.targets)[rows].sum()) / len(rows),
        blocks=tuple(
            BlockRemoval(**{kind: _curve(counts / len(rows)) for kind, counts in of_block.items()})
            for of_block in sums
        ),
        seed=seed,
        repeats=repeats,
    )


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
