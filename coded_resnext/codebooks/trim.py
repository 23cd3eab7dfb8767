"""Taking surplus words out of a union of orbits, so that the rest stays balanced.

The words that go must load the columns evenly themselves. The images of a word under a subgroup H
do so exactly when the word has equally many ones in each of the blocks into which H divides the
columns: such units are taken first, large ones before small ones, those with the most pairs at the
minimum distance before others. The few words that are left over are chosen one by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .groups import Group, subgroup
from .switches import even_out
from .words import Ints, Words, is_balanced, overlaps

SUBGROUPS = 6
EXCHANGES = 2000
# Words among which single ones are chosen.
POOL = 4000


def trim(
    words: Words, count: int, group: Group, distance: int, rng: np.random.Generator
) -> Words | None:
    """`[count, N]` of the words of a union of orbits of a freely acting group, balanced.

    A few words may be changed in two digits when the choice alone does not level the loads.

    Returns:
        The words, at least `distance` apart when the given ones are; None when none was found.
    """
    branches = words.shape[1]
    active = int(words[0].sum())
    degrees = _degrees(words, active - distance // 2)
    keep = np.ones(len(words), dtype=bool)
    for order in range(branches, 1, -1):
        units = int(keep.sum() - count) // order
        if branches % order == 0 and active * order % branches == 0 and units:
            for unit in _even_units(words, keep, degrees, group, order, rng)[:units]:
                keep[unit] = False
    left = np.flatnonzero(keep)
    surplus = len(left) - count
    if surplus:
        pool = left[rng.permutation(len(left))[: max(POOL, 2 * surplus)]]
        keep[pool[_level_choice(words[pool], surplus, rng)]] = False
    return even_out(words[keep], distance)


def _degrees(words: Words, limit: int) -> Ints:
    """`[K]` numbers of words at the minimum distance; zeros where counting would take long."""
    if len(words) > 6000:
        return np.zeros(len(words), dtype=np.int64)
    degrees: Ints = (overlaps(words, words) == limit).sum(axis=1, dtype=np.int64)
    return degrees


def _even_units(
    words: Words,
    keep: npt.NDArray[np.bool_],
    degrees: Ints,
    group: Group,
    order: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Disjoint sets of `order` rows that load all columns equally, most pairs first."""
    row_of = {row.tobytes(): index for index, row in enumerate(words) if keep[index]}
    best: list[list[int]] = []
    best_score = -1
    for members in _subgroups(group, order, rng):
        blocks = np.unique(np.sort(group[members].T, axis=1), axis=0)
        ones = words[:, blocks].sum(axis=2)
        even = np.flatnonzero((ones == ones[:, :1]).all(axis=1) & keep)
        even = even[np.argsort(-degrees[even], kind="stable")]
        taken: set[int] = set()
        units = []
        for index in even[: 64 * order].tolist():
            if index not in taken:
                unit = {row_of.get(image.tobytes(), -1) for image in words[index][group[members]]}
                taken |= unit
                if len(unit) == order and -1 not in unit:
                    units.append(sorted(unit))
        score = sum(int(degrees[unit].sum()) for unit in units[:4])
        if units and score > best_score:
            best, best_score = units, score
    return best


def _subgroups(group: Group, order: int, rng: np.random.Generator) -> list[list[int]]:
    """Some subgroups of an order, found by generating from random elements."""
    found = {tuple(range(len(group)))} if order == len(group) else set()
    for _ in range(0 if found else 60):
        generators = rng.integers(1, len(group), size=int(rng.integers(1, 5))).tolist()
        members = tuple(subgroup(group, generators))
        if len(members) == order:
            found.add(members)
        if len(found) == SUBGROUPS:
            break
    return [list(members) for members in sorted(found)]


def _level_choice(words: Words, count: int, rng: np.random.Generator) -> Ints:
    """Indices of `count` words with column loads as equal as exchanges make them."""
    rows = words.astype(np.float64)
    chosen = rng.permutation(len(words))[:count]
    ideal = count * int(words[0].sum()) / words.shape[1]
    best, best_cost = chosen.copy(), np.inf
    for _ in range(EXCHANGES):
        loads = rows[chosen].sum(axis=0)
        cost = float(((loads - ideal) ** 2).sum())
        if cost < best_cost:
            best, best_cost = chosen.copy(), cost
            if is_balanced(words[best]):
                break
        position = int(rng.integers(count))
        without = loads - rows[chosen[position]] - ideal
        score = 2 * rows @ without + rng.random(len(words)) * (1.5 if rng.random() < 0.3 else 0.01)
        score[chosen] = np.inf
        chosen[position] = int(np.argmin(score))
    return best
