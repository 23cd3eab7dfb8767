"""Annealing by switches: moves that leave weights and column loads as they are.

A switch takes two words a, b and two columns i, j with a = 1, 0 and b = 0, 1 there, and exchanges
the four digits. Any two matrices with the same row and column sums are connected by such switches
(H. J. Ryser, 1957). Where the loads need not be exactly equal there is a second move: one word
moves a one from a fuller column to an emptier one. Shapes: `words[K, N]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import comb
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .bounds import distance_bound
from .words import Ints, Words, all_words, distance_histogram, from_sets, overlaps

# Price of a pair of words that is too near, in pairs at the minimum distance.
CONFLICT_PRICE = 8
WARM, COLD = 2.0, 0.08


class Annealed(NamedTuple):
    """Words without a conflict, and their number of pairs at the minimum distance."""

    words: Words
    pairs: int


def even_words(loads: Ints, count: int, active: int, random: Random) -> Words:
    """Returns `[count, N]` words that fill the emptiest columns first; `loads` is left as it
    was."""
    loads = loads.copy()
    words = np.zeros((count, len(loads)), dtype=np.uint8)
    for word in words:
        ties = np.array([random.random() for _ in loads])
        emptiest = np.lexsort((ties, loads))[:active]
        word[emptiest] = 1
        loads[emptiest] += 1
    return words


def anneal(
    words: Words,
    first: int,
    distance: int,
    steps: int,
    enough: int,
    random: Random,
    report: Callable[[Annealed], None],
) -> Annealed | None:
    """Moves the words from row `first` on until all are `distance` apart, with few pairs at it.

    Args:
        words: `[K, N]` start, of equal weights; not changed.
        first: the rows before it stay as they are.
        distance: required minimum distance among all rows (that of the fixed rows is not looked
            at).
        steps: moves tried; the temperature falls with their number.
        enough: stops when no more pairs than this are at the distance.
        random: source of randomness.
        report: called with every improvement.

    Returns:
        The best words met, or None when they always had a conflict.
    """
    moving = len(words) - first
    if moving < 1:
        return None
    branches = words.shape[1]
    active = int(words[0].sum())
    limit = active - distance // 2
    overlap = np.arange(active + 3)
    # A word meets itself "nowhere": at an index that costs nothing.
    nowhere = active + 2
    clash = (overlap > limit) & (overlap <= active)
    price = np.where(overlap == limit, 1, CONFLICT_PRICE * clash * (overlap - limit) ** 2)
    # Row r holds the overlaps of word first + r with all words.
    common = overlaps(words[first:], words).astype(np.int16)
    common[np.arange(moving), np.arange(first, len(words))] = nowhere
    words = words.astype(np.int8)
    ones = [np.flatnonzero(word).tolist() for word in words[first:]]
    loads = words.sum(axis=0, dtype=np.int64)
    fullest, emptiest = int(loads.max()), int(loads.min())
    best: Annealed | None = None

    def total(table: Ints) -> int:
        """Returns the sum over the pairs with a word that moves, each once."""
        values = table[common]
        return int(values[:, :first].sum() + values[:, first:].sum() // 2)

    def replace(row: int, give: int, take: int, meets: npt.NDArray[np.int16]) -> int:
        """Moves a one of a word; returns the change of the number of conflicts."""
        changed = int(clash[meets].sum()) - int(clash[common[row]].sum())
        common[row] = meets
        common[:, first + row] = meets[first:]
        words[first + row, give], words[first + row, take] = 0, 1
        ones[row][ones[row].index(give)] = take
        return changed

    energy, conflicts = total(price), total(clash.astype(np.int64))
    for step in range(steps + 1):
        if conflicts == 0 and (best is None or energy < best.pairs):
            best = Annealed(words.astype(np.uint8), energy)
            report(best)
            if energy <= enough:
                break
        a, b = int(random.random() * moving), int(random.random() * moving)
        give, take = ones[a][int(random.random() * active)], int(random.random() * branches)
        if a != b:
            take = ones[b][int(random.random() * active)]
            if words[first + b, give] or words[first + a, take]:
                continue
        elif (
            words[first + a, take]
            or fullest == emptiest
            or loads[give] < fullest
            or loads[take] > emptiest
        ):
            continue
        shift = words[:, take] - words[:, give]
        meets_a = common[a] + shift
        meets_a[first + a] = nowhere
        change = -int(price[common[a]].sum())
        if a != b:
            # a and b differ in both columns before and after: what they share stays.
            meets_a[first + b] = common[a, first + b]
            meets_b = common[b] - shift
            meets_b[[first + a, first + b]] = common[a, first + b], nowhere
            change += int(price[meets_b].sum()) - int(price[common[b]].sum())
        change += int(price[meets_a].sum())
        temperature = WARM * (COLD / WARM) ** (step / steps)
        if change > 0 and random.random() >= math.exp(-change / temperature):
            continue
        energy += change
        conflicts += replace(a, give, take, meets_a)
        if a != b:
            conflicts += replace(b, take, give, meets_b)
        else:
            loads[[give, take]] += -1, 1
            fullest, emptiest = int(loads.max()), int(loads.min())
    return best


def even_out(words: Words, distance: int, first: int = 0) -> Words | None:
    """Makes column loads differ by one at most, word by word, without going below a distance.

    One word at a time moves a one from a fullest to an emptiest column. For distance 2 this always
    ends well when all rows may move (`first = 0`): more words have (1, 0) than (0, 1) in two such
    columns, and moving the one is injective, so some result is not yet a word. Each move lowers
    the sum of squares of the loads.

    Returns:
        The words, or None when no move keeps the distance.
    """
    words = words.copy()
    limit = int(words[0].sum()) - distance // 2
    rows = words.astype(np.float32)
    loads = words.sum(axis=0, dtype=np.int64)
    while loads.max() - loads.min() > 1:
        move = _levelling_move(rows, loads, limit, first)
        if move is None:
            return None
        row, give, take = move
        words[row, [give, take]] = 0, 1
        rows[row, [give, take]] = 0, 1
        loads[[give, take]] += -1, 1
    return words


def _levelling_move(
    rows: npt.NDArray[np.float32], loads: Ints, limit: int, first: int
) -> tuple[int, int, int] | None:
    for give in np.flatnonzero(loads == loads.max()):
        for take in np.flatnonzero(loads == loads.min()):
            shift = rows[:, take] - rows[:, give]
            movable = np.flatnonzero(shift[first:] < 0) + first
            step = max(1, (1 << 21) // len(rows))
            for start in range(0, len(movable), step):
                block = movable[start : start + step]
                common = rows[block] @ rows.T + shift
                common[np.arange(len(block)), block] = -1
                allowed = np.flatnonzero(common.max(axis=1) <= limit)
                if len(allowed):
                    return int(block[allowed[0]]), int(give), int(take)
    return None


STEPS = 20_000


def grow(words: Words, count: int, seed: int = 0) -> Words:
    """Returns `[K + count, N]`: the given words, then new ones of the same weight.

    The new words fill the emptiest branches, so that the loads come as near to each other as the
    old words allow. Among such words, annealing by switches looks for some that keep the minimum
    distance of the old ones, or else the next smaller one, and so on.

    Raises:
        ValueError: `count` is below 1, or there are not that many other words.
    """
    total, branches = len(words) + count, words.shape[1]
    active = int(words[0].sum())
    if count < 1:
        raise ValueError(f"new_classes: expected at least 1, got {count}")
    if total > comb(branches, active):
        raise ValueError(
            f"new_classes: {branches} branches with {active} active have "
            f"{comb(branches, active)} different codewords, {len(words)} are in use, "
            f"got {count} new classes"
        )
    loads = words.sum(axis=0, dtype=np.int64)
    distance = min(min(distance_histogram(words)), distance_bound(total, branches, active))
    while distance >= 2:
        random = Random(f"{seed} {distance}")  # noqa: S311
        start = np.concatenate([words, even_words(loads, count, active, random)])
        grown = anneal(start, len(words), distance, STEPS, 0, random, lambda annealed: None)
        if grown is not None:
            return grown.words
        distance -= 2
    # Nearly all words are in use: take what is left, the evenest first.
    used = {word.tobytes() for word in words}
    rest = from_sets(
        [
            np.flatnonzero(word)
            for word in all_words(branches, active)
            if word.tobytes() not in used
        ],
        branches,
    )
    chosen = []
    for _ in range(count):
        index = int(np.argmin(rest @ loads))
        chosen.append(rest[index])
        loads += rest[index]
        rest = np.delete(rest, index, axis=0)
    return np.concatenate([words, np.array(chosen, dtype=np.uint8)])
