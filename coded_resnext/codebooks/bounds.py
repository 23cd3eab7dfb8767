"""What no codebook can beat: bounds on the minimum distance and on the pairs that attain it.

Letters: K classes, N branches, A active branches per class, d minimum distance. All arithmetic is
on integers, so every bound is a proof. docs/codebooks.md derives them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import count, product
from math import comb, lcm
from typing import NamedTuple

import numpy as np

# Patterns of so many columns enter the bound on pairs; larger ones hardly tighten it.
PATTERN_SIZE = 4
# More words than any codebook has; their bound is the number of all words.
_MANY = 2**40


class Bounds(NamedTuple):
    """Bounds for `K` words of length `N` and weight `A`, and how near a codebook comes.

    Attributes:
        distance: no codebook of this size has a larger minimum distance.
        pairs: every codebook of this size (and as balanced as this one) with the minimum distance
            of this one has at least so many pairs of classes at it.
        distance_reached: the codebook's minimum distance.
        pairs_reached: its number of pairs at that distance.
    """

    distance: int
    pairs: int
    distance_reached: int
    pairs_reached: int

    @property
    def optimal_distance(self) -> bool:
        """Returns whether the minimum distance is proved the largest possible."""
        return self.distance_reached == self.distance

    @property
    def optimal(self) -> bool:
        """Returns whether it is proved best: the largest distance, then the fewest pairs at it."""
        return self.optimal_distance and self.pairs_reached == self.pairs

    def __str__(self) -> str:
        if self.optimal:
            return f"optimal: distance {self.distance} with {self.pairs} pairs"
        distance = (
            f"distance {self.distance_reached} is optimal"
            if self.optimal_distance
            else f"distance {self.distance_reached}, at most {self.distance} is possible"
        )
        pairs = (
            f"{self.pairs_reached} pairs at it is optimal"
            if self.pairs_reached == self.pairs
            else f"{self.pairs_reached} pairs at it, at least {self.pairs} are necessary"
        )
        return f"{distance}; {pairs}"


@cache
def johnson_bound(branches: int, distance: int, active: int) -> int:
    """Returns an upper bound on the number of words of length N, weight A and distance >= d.

    Fix a column: the words with a one there, the one removed, are words of length N - 1 and weight
    A - 1; those with a zero there are words of length N - 1 and weight A. Counting ones and zeros
    over all columns gives the two recursions; counting common ones of all pairs gives the third
    inequality (S. Johnson, "A new upper bound for error-correcting codes", 1962).
    """
    active = min(active, branches - active)
    if distance <= 2:
        return comb(branches, active)
    half = (distance + 1) // 2
    before = np.ones(1, dtype=np.int64)
    for N in range(1, branches + 1):
        A = np.arange(min(N // 2, active) + 1)
        row = np.ones(len(A), dtype=np.int64)
        row[half == A] = N // half
        A = A[half + 1 :]
        if len(A):
            one = N * before[A - 1] // A
            zero = N * before[np.minimum(A, N - 1 - A)] // (N - A)
            bound = np.minimum(one, zero)
            excess = A * A - N * (A - half)
            third = N * half // np.maximum(excess, 1)
            bound = np.where(excess > 0, np.minimum(bound, third), bound)
            row[half + 1 :] = np.minimum(bound, _MANY)
        before = row
    bound_of_all = int(before[active])
    return bound_of_all if bound_of_all < _MANY else comb(branches, active)


def distance_bound(classes: int, branches: int, active: int) -> int:
    """Returns the largest even distance that the Johnson bound leaves to K words; 2 at least."""
    # The bound falls as the distance grows.
    possible = range(1, min(active, branches - active))
    halves = bisect_left(
        possible, True, key=lambda half: johnson_bound(branches, 2 * half + 2, active) < classes
    )
    return 2 + 2 * halves


def pair_bound(
    classes: int, branches: int, active: int, distance: int, balanced: bool = True
) -> int | None:
    """Returns the least number of pairs at distance d when none is nearer; None: no such words.

    Let n_i be the number of pairs of words with i ones in common, i <= A - d/2. They satisfy

    * sum n_i = K (K - 1) / 2;
    * for s ones and t zeros: choose s + t columns; a word fits when it has ones in the first s and
      zeros in the last t. The pairs of words that fit together, summed over all choices, number
      sum C(i, s) C(N - 2A + i, t) n_i, and at least what they would be if the choices shared the
      words as evenly as whole numbers allow. For s = 1, t = 0 this is an equality in codebooks
      whose column loads differ by one at most (`balanced`);
    * Delsarte's inequalities of the Johnson scheme (P. Delsarte, "An algebraic approach to the
      association schemes of coding theory", 1973, section 4.2).

    The least n_(A - d/2) under these is a linear program with a handful of unknowns. It is solved
    in whole numbers and rounded up.
    """
    # Complementing the words changes neither the distances nor the balance.
    active = min(active, branches - active)
    outside = branches - 2 * active
    overlaps = range(active - distance // 2 + 1)
    if not overlaps:
        return None
    pairs = classes * (classes - 1) // 2
    rows = [[1 for _ in overlaps], [-1 for _ in overlaps]]
    least = [pairs, -pairs]
    for ones, zeros in product(range(PATTERN_SIZE + 1), repeat=2):
        if 1 <= ones + zeros <= PATTERN_SIZE:
            rows.append([comb(i, ones) * comb(outside + i, zeros) for i in overlaps])
            fits = classes * comb(active, ones) * comb(branches - active, zeros)
            # One when there are no such columns: nothing fits then either.
            patterns = max(1, comb(branches, ones) * comb(max(branches - ones, 0), zeros))
            least.append(_evenly_shared_pairs(fits, patterns))
    if balanced:
        rows.append([-i for i in overlaps])
        least.append(-_evenly_shared_pairs(classes * active, branches))
    spheres = [comb(active, i) * comb(branches - active, active - i) for i in overlaps]
    scale = lcm(*spheres)
    for index in range(1, active + 1):
        rows.append(
            [
                2 * _eberlein(branches, active, active - i, index) * (scale // sphere)
                for i, sphere in zip(overlaps, spheres, strict=True)
            ]
        )
        least.append(-classes * scale)
    return _least_last(rows, least)


def codebook_bounds(
    classes: int, branches: int, active: int, distances: dict[int, int], balanced: bool
) -> Bounds:
    """Returns the bounds beside the distance histogram of a codebook.

    `balanced` says that its column loads differ by one at most; the bound on pairs is then that of
    the balanced codebooks, else that of all codebooks.
    """
    own_distance = min(distances)
    distance = distance_bound(classes, branches, active)
    while (
        distance > own_distance
        and pair_bound(classes, branches, active, distance, balanced) is None
    ):
        distance -= 2
    pairs = pair_bound(classes, branches, active, own_distance, balanced)
    assert pairs is not None, "the bound excludes a codebook that exists"
    return Bounds(distance, max(pairs, 1), own_distance, distances[own_distance])


def _evenly_shared_pairs(incidences: int, subsets: int) -> int:
    """Returns the least sum of C(load, 2) when `incidences` are shared out over `subsets`."""
    load, more = divmod(incidences, subsets)
    return (subsets - more) * comb(load, 2) + more * comb(load + 1, 2)


def _eberlein(branches: int, active: int, steps: int, index: int) -> int:
    """Returns the eigenvalue of "distance 2 * steps" of the Johnson scheme on an eigenspace."""
    return sum(
        (-1) ** j
        * comb(index, j)
        * comb(active - index, steps - j)
        * comb(branches - active - index, steps - j)
        for j in range(min(steps, index) + 1)
    )


def _least_last(rows: Sequence[Sequence[int]], least: Sequence[int]) -> int | None:
    """Returns the least last entry of n >= 0 with rows . n >= least, rounded up; None: no n.

    The simplex method on the dual: maximise least . y with rows^T y <= (0, .., 0, 1) and y >= 0,
    from y = 0. The table holds whole numbers over one common denominator, the last pivot, and every
    division below leaves no remainder (Edmonds; Bareiss). Steepest column first; after a while
    smallest index first, which cannot cycle (Bland).
    """
    unknowns, multipliers = len(rows[0]), len(rows)
    identity = [[int(i == k) for k in range(unknowns)] for i in range(unknowns)]
    table = [[row[i] for row in rows] + identity[i] + [0] for i in range(unknowns)]
    table[-1][-1] = 1
    table.append([-value for value in least] + [0] * (unknowns + 1))
    sizes = [max(map(abs, row)) or 1 for row in rows] + [1] * unknowns
    basis = [multipliers + i for i in range(unknowns)]
    denominator = 1
    for step in count():
        gains = table[-1][:-1]
        entering = min(range(len(gains)), key=lambda j: gains[j] / (sizes[j] * denominator))
        if gains[entering] >= 0:
            return -(-table[-1][-1] // denominator)
        if step > 4 * len(gains):
            entering = next(j for j, gain in enumerate(gains) if gain < 0)
        candidates = [i for i in range(unknowns) if table[i][entering] > 0]
        if not candidates:
            return None
        leaving = min(
            candidates, key=lambda i: (Fraction(table[i][-1], table[i][entering]), basis[i])
        )
        pivot_row, pivot = table[leaving], table[leaving][entering]
        for i, row in enumerate(table):
            if i != leaving:
                factor = row[entering]
                table[i] = [
                    (value * pivot - factor * other) // denominator
                    for value, other in zip(row, pivot_row, strict=True)
                ]
        denominator = pivot
        basis[leaving] = entering
    raise AssertionError("unreachable")
