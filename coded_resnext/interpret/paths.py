"""Paths: the energy that every branch really spends on every class, beside the codewords.

And on every image: one whose energy lies outside the path of its class is odd, or mislabelled.

Are the paths semantic? Codewords are dealt to the classes without regard to what the classes look
like. If a network put classes that look alike on like paths all the same, the distances between the
energies of classes would depart from those between their codewords, and the more so the more two
classes are confused. `Semantics` compares these distances with codewords and confusion.

Letters as in docs/math.md: K classes, N branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook

from .observe import Observations, require_coded_blocks

LISTED = 20
Floats = NDArray[np.float64]
# Random relabellings of up to 100 classes, and of more, where each costs milliseconds.
PERMUTATIONS, FEW_PERMUTATIONS = 499, 99
ROWS = 64
MATRIX_CLASSES = 100


@dataclass(frozen=True)
class Disobedient:
    """An image that does not keep to the path of its class."""

    position: int
    """Position of the image in the loader, from 0."""
    target: int
    """Class of the image, according to its label."""
    prediction: int
    """The class that the network says."""
    decoded: tuple[int, ...]
    """The class whose codeword is nearest, (9), in every coded block."""
    outside: tuple[float, ...]
    """Share of the energy in branches that do not work for its class, in every coded block."""


@dataclass(frozen=True, eq=False)
class Paths:
    """Mean energies of the branches by class, on the scale of the codewords."""

    samples_per_class: tuple[int, ...]
    """Images of every class that were averaged."""
    energies: tuple[Tensor, ...]
    """For every coded block, `[K, N]` in float64: the mean of `r Ebar`, (4), which a perfect
    network makes equal to the codeword (rows sum to A); NaN for a class without images."""
    outside: tuple[float, ...]
    """For every coded block, the mean share of an image's energy in branches that do not work for
    its class; 0 where all keep to their paths, `1 - r` where the code has no effect."""
    disobeying: tuple[int, ...]
    """For every coded block, the images whose energies are nearest to another class's codeword."""
    disobedient: tuple[Disobedient, ...]
    """The 20 images with the most energy outside their path (mean over the blocks), worst first,
    of those that disobey in some block."""

    @classmethod
    def of(cls, observed: Observations) -> Paths:
        """Averages the energies by class in every coded block; ValueError if there is none."""
        require_coded_blocks(observed.codebooks)
        targets = observed.targets
        counts = targets.bincount(minlength=len(observed.class_names))
        means = []
        for energies, book in zip(observed.energies, observed.codebooks, strict=True):
            total = torch.zeros(book.classes, book.branches, dtype=torch.float64)
            total.index_add_(0, targets, energies.double())
            # A class without images divides 0 by 0: NaN.
            means.append(book.ratio * total / counts[:, None])
        outside = energy_outside(observed)
        disobeying = torch.stack([decoded != targets for decoded in observed.decoded], 1)
        order = outside.mean(1).sort(descending=True, stable=True).indices
        listed = [row for row in order.tolist() if bool(disobeying[row].any())][:LISTED]
        return cls(
            samples_per_class=tuple(counts.tolist()),
            energies=tuple(means),
            outside=tuple(outside.mean(0).tolist()),
            disobeying=tuple(disobeying.sum(0).tolist()),
            disobedient=tuple(
                Disobedient(
                    position=row,
                    target=int(targets[row]),
                    prediction=int(observed.predictions[row]),
                    decoded=tuple(int(decoded[row]) for decoded in observed.decoded),
                    outside=tuple(outside[row].tolist()),
                )
                for row in listed
            ),
        )


def energy_outside(observed: Observations) -> Tensor:
    """Returns the share of every image's energy in branches that do not work for its class.

    Returns:
        `[n, L]` in float64 for L coded blocks; 1 for an image without any energy in a block.
    """
    shares = []
    for energies, book in zip(observed.energies, observed.codebooks, strict=True):
        inside = (energies.double() * book.codewords[observed.targets]).sum(1)
        shares.append(1 - inside / book.branches)
    return torch.stack(shares, 1)


@dataclass(frozen=True)
class ByDistance:
    """Pairs of classes whose codewords differ in so many digits."""

    distance: int
    """Hamming distance of the codewords."""
    pairs: int
    energy_distance: float
    """Mean Euclidean distance of the classes' mean energies `r Ebar`; with perfect energies it is
    the square root of the Hamming distance."""
    energy_deviation: float
    """Standard deviation over the pairs (n - 1); 0 for one pair."""
    confusion: float
    """Mean confusion of the pairs: the probability that the network gives to the one class for
    images of the other, both ways averaged."""


@dataclass(frozen=True)
class Pair:
    """Two classes that lie nearer to each other than the distance of their codewords says."""

    classes: tuple[int, int]
    distance: int
    """Hamming distance of the codewords."""
    energy_distance: float
    expected: float
    """Mean energy distance of all pairs at this Hamming distance."""
    confusion: float


@dataclass(frozen=True, eq=False)
class BlockSemantics:
    """One coded block; correlations are None where one side does not vary."""

    by_distance: tuple[ByDistance, ...]
    """The pairs of classes by Hamming distance, ascending."""
    codeword_correlation: float | None
    """Pearson's, of the energy distances with the Euclidean distances of the codewords: 1 when the
    code alone decides."""
    confusion_correlation: float | None
    """Spearman's, of the energy distances, less their mean at the same Hamming distance, with the
    confusion: below 0 when classes that are confused lie nearer than their codewords say."""
    confusion_p: float | None
    """Share of random relabellings of the classes that give a correlation as far from 0 (Mantel's
    test, two-sided, seeded)."""
    codeword_confusion_correlation: float | None
    """Spearman's, of the Hamming distances with the confusion: below 0 when classes with near
    codewords are confused more."""
    nearest: tuple[Pair, ...]
    """The 20 pairs that lie nearest, measured by what is expected."""
    energy_distances: Tensor | None
    """`[K, K]` of the classes with images, NaN rows for others; None for more than 100 classes."""


@dataclass(frozen=True, eq=False)
class Semantics:
    """Whether the paths of classes say something about what the classes look like."""

    classes: int
    """Classes that are compared: those with images, or of more than 2,000 classes a seeded draw."""
    blocks: tuple[BlockSemantics, ...]
    """The coded blocks, in order."""
    permutations: int
    seed: int

    @classmethod
    def of(cls, observed: Observations, paths: Paths, *, seed: int = 0) -> Semantics:
        """Compares the distances of classes in energies, codewords and confusion.

        Args:
            observed: what `observe` returned for a coded network.
            paths: the paths of the same observations.
            seed: decides the random relabellings; at least 0.

        Raises:
            ValueError: fewer than three classes have images.
        """
        compared = observed.compared or range(len(paths.samples_per_class))
        positions = [
            position for position, index in enumerate(compared) if paths.samples_per_class[index]
        ]
        present = [compared[position] for position in positions]
        if len(present) < 3:
            raise ValueError(
                "classes: expected images of at least three to compare their distances, "
                f"got images of {len(present)}"
            )
        chances = observed.probabilities[positions][:, positions].numpy()
        confusion = (chances + chances.T) / 2
        generator = np.random.default_rng((seed, 4))
        count = PERMUTATIONS if len(present) <= MATRIX_CLASSES else FEW_PERMUTATIONS
        orders = [generator.permutation(len(present)) for _ in range(count)]
        blocks = tuple(
            _compare(energies[present].numpy(), book, present, confusion, orders)
            for energies, book in zip(paths.energies, observed.codebooks, strict=True)
        )
        return cls(len(present), blocks, count, seed)


def _compare(
    energies: Floats,
    book: Codebook,
    present: list[int],
    confusion: Floats,
    orders: list[NDArray[np.int64]],
) -> BlockSemantics:
    words = book.codewords[present].double().numpy()
    upper = np.triu_indices(len(present), 1)
    hamming = np.rint(_squared_distances(words))[upper].astype(int)
    matrix = np.sqrt(_squared_distances(energies))
    distances, confused = matrix[upper], confusion[upper]
    counts = np.bincount(hamming)
    mean, confusions = (
        np.bincount(hamming, values) / np.maximum(counts, 1) for values in (distances, confused)
    )
    excess = distances - mean[hamming]
    variances = np.bincount(hamming, excess**2) / np.maximum(counts - 1, 1)
    groups = [
        ByDistance(
            distance=distance,
            pairs=int(counts[distance]),
            energy_distance=float(mean[distance]),
            energy_deviation=float(np.sqrt(variances[distance])),
            confusion=float(confusions[distance]),
        )
        for distance in np.flatnonzero(counts).tolist()
    ]
    # Rounding must not pass for a difference.
    excess[np.abs(excess) < 1e-9 * distances.max()] = 0
    order = np.argsort(excess, kind="stable")[:LISTED].tolist()
    ranks = _ranks(confused)
    correlation, p = _mantel(_ranks(excess), ranks, upper, orders)
    every = None
    if book.classes <= MATRIX_CLASSES:
        every = torch.full((book.classes, book.classes), float("nan"), dtype=torch.float64)
        every[torch.tensor(present)] = 0.0
        every[torch.tensor(present)[:, None], torch.tensor(present)] = torch.from_numpy(matrix)
    return BlockSemantics(
        by_distance=tuple(groups),
        codeword_correlation=_pearson(distances, np.sqrt(hamming)),
        confusion_correlation=correlation,
        confusion_p=p,
        codeword_confusion_correlation=_pearson(_mean_ranks(counts)[hamming], ranks),
        nearest=tuple(
            Pair(
                classes=(present[upper[0][pair]], present[upper[1][pair]]),
                distance=int(hamming[pair]),
                energy_distance=float(distances[pair]),
                expected=float(mean[hamming[pair]]),
                confusion=float(confused[pair]),
            )
            for pair in order
        ),
        energy_distances=every,
    )


def _mantel(
    excess: Floats,
    confusion: Floats,
    upper: tuple[NDArray[np.int64], NDArray[np.int64]],
    orders: list[NDArray[np.int64]],
) -> tuple[float | None, float | None]:
    """Returns the correlation of ranks, and how often a relabelling gives one as far from 0."""
    correlation = _pearson(excess, confusion)
    if correlation is None:
        return None, None
    classes = len(orders[0])
    ranked, centred = np.zeros((2, classes, classes))
    ranked[upper] = confusion
    ranked += ranked.T
    centred[upper] = excess - excess.mean()

    def product(order: NDArray[np.int64]) -> float:
        total = 0.0
        # A few rows and what lies above the diagonal: caches hold these.
        for start in range(0, len(order), ROWS):
            relabelled = ranked[order[start : start + ROWS]].take(order[start:], axis=1)
            total += np.einsum("ij,ij", centred[start : start + ROWS, start:], relabelled)
        return abs(total)

    # Relabelling changes neither mean nor deviation, so that inner products compare as well; ranks
    # are half integers, and their rounding far from half of one.
    limit = product(np.arange(len(ranked))) - 1e-3
    extreme = sum(product(order) >= limit for order in orders)
    return correlation, (1 + extreme) / (1 + len(orders))


def _squared_distances(rows: Floats) -> Floats:
    """Returns the squared distances `[K, K]` of the rows `[K, N]`."""
    norms = (rows * rows).sum(1)
    squared: Floats = np.maximum(norms[:, None] + norms - 2 * rows @ rows.T, 0)
    np.fill_diagonal(squared, 0)
    return squared


def _ranks(values: NDArray[Any]) -> Floats:
    """Returns ranks from 0; equal values share their mean rank."""
    _, positions, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = _mean_ranks(counts)[positions]
    return ranks


def _mean_ranks(counts: NDArray[np.int64]) -> Floats:
    """Returns the ranks of ascending values that occur so many times each."""
    ranks: Floats = np.cumsum(counts) - (counts + 1) / 2
    return ranks


def _pearson(first: Floats, second: Floats) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
