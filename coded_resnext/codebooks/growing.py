"""More classes for a codebook that is in use: its codewords stay, new ones are added."""

from __future__ import annotations

from math import comb
from random import Random

import numpy as np

from .bounds import distance_bound
from .switches import anneal, even_words
from .words import Words, all_words, distance_histogram, from_sets

STEPS = 20_000


def grow(words: Words, count: int, seed: int = 0) -> Words:
    """`[K + count, N]`: the given words, then new ones of the same weight.

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
