"""Annealing by switches: moves that leave weights and column loads as they are.

A switch takes two words a, b and two columns i, j with a = 1, 0 and b = 0, 1 there, and exchanges
the four digits. Any two matrices with the same row and column sums are connected by such switches
(H. J. Ryser, 1957). Where the loads need not be exactly equal there is a second move: one word
moves a one from a fuller column to an emptier one. Shapes: `words[K, N]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np

from coded_resnext.codebooks.words import Ints, Words, overlaps

# Price of a pair of words that is too near, in pairs at the minimum distance.
CONFLICT_PRICE = 8
WARM, COLD = 2.0, 0.08


class Annealed(NamedTuple):
    """Words without a conflict, and their number of pairs at the minimum distance."""

    words: Words
    pairs: int


def even_words(loads: Ints, count: int, active: int, random: Random) -> Words:
    """`[count, N]` words that fill the emptiest columns first; `loads` is left as it was."""
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
    """Move the words from row `first` on until all are `distance` apart, with few pairs at it.

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
    words = words.astype(np.int8)
    count, branches = words.shape
    active = int(words[0].sum())
    limit = active - distance // 2
    above = np.maximum(np.arange(active + 1) - limit, 0)
    price = np.where(np.arange(active + 1) == limit, 1, CONFLICT_PRICE * above**2)
    common = overlaps(words.astype(np.uint8), words.astype(np.uint8)).astype(np.int16)
    # A word meets itself nowhere: an overlap that costs nothing, whatever is added.
    price = np.concatenate([price, np.zeros(3, dtype=price.dtype)])
    nowhere = active + 2
    np.fill_diagonal(common, nowhere)
    if first == count:
        return None
    pairs_of = np.triu_indices(count, 1)
    moving = pairs_of[1] >= first
    energy = int(price[common[pairs_of][moving]].sum())
    ones = [np.flatnonzero(word).tolist() for word in words]
    loads = words.sum(axis=0, dtype=np.int64)
    fullest, emptiest = int(loads.max()), int(loads.min())
    best: Annealed | None = None

    def clean() -> bool:
        moved = common[first:]
        return bool((moved[moved != nowhere] <= limit).all())

    def settle(row: int, give: int, take: int) -> None:
        words[row, give], words[row, take] = 0, 1
        ones[row][ones[row].index(give)] = take

    def keep_if_better() -> None:
        nonlocal best
        if (best is None or energy < best.pairs) and clean():
            best = Annealed(words.astype(np.uint8), energy)
            report(best)

    keep_if_better()
    for step in range(steps):
        if best is not None and best.pairs <= enough:
            break
        temperature = WARM * (COLD / WARM) ** (step / steps)
        a = first + int(random.random() * (count - first))
        b = int(random.random() * (count - first)) + first
        give = ones[a][int(random.random() * active)]
        if a != b:
            take = ones[b][int(random.random() * active)]
            if words[b, give] or words[a, take]:
                continue
        else:
            take = int(random.random() * branches)
            if words[a, take] or loads[give] != fullest or loads[take] != emptiest:
                continue
            if fullest == emptiest:
                continue
        shift = words[:, take].astype(np.int16) - words[:, give]
        old_a, old_b = common[a], common[b]
        new_a = old_a + shift
        new_a[a] = nowhere
        change = int(price[new_a].sum() - price[old_a].sum())
        if a != b:
            # The pair a, b exchanges two digits between its words: its overlap stays.
            new_a[b] = old_a[b]
            change = int(price[new_a].sum() - price[old_a].sum())
            new_b = old_b - shift
            new_b[b], new_b[a] = nowhere, old_b[a]
            change += int(price[new_b].sum() - price[old_b].sum())
        if change > 0 and random.random() >= math.exp(-change / temperature):
            continue
        common[a], common[:, a] = new_a, new_a
        settle(a, give, take)
        if a != b:
            common[b], common[:, b] = new_b, new_b
            settle(b, take, give)
        else:
            loads[give] -= 1
            loads[take] += 1
            fullest, emptiest = int(loads.max()), int(loads.min())
        energy += change
        keep_if_better()
    return best


def even_out(words: Words, distance: int, first: int = 0) -> Words | None:
    """Make column loads differ by one at most, word by word, without going below a distance.

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
    rows: np.ndarray[tuple[int, int], np.dtype[np.float32]], loads: Ints, limit: int, first: int
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
