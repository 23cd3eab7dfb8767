"""Codewords as a matrix of bytes, the form in which the package computes.

Shapes: `words[K, N]` holds 0 and 1; K classes, N branches, A ones in every row.
The distance of two words of weight A follows from their overlap (branches in common):
`distance = 2 * (A - overlap)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

# Entries of the overlap matrix that are held at a time.
CHUNK_ENTRIES = 1 << 22


def from_strings(words: Iterable[str]) -> Words:
    """Returns `[K, N]` from strings of 0 and 1 of equal length."""
    return np.array([[digit == "1" for digit in word] for word in words], dtype=np.uint8)


def to_strings(words: Words) -> list[str]:
    """Returns the rows as strings of 0 and 1."""
    digits = (words + ord("0")).astype(np.uint8)
    return [row.tobytes().decode("ascii") for row in digits]


def from_sets(sets: Iterable[Iterable[int]], branches: int) -> Words:
    """Returns `[K, N]` from the sets of active branches, which have one size."""
    members = np.array([list(columns) for columns in sets], dtype=np.intp)
    words = np.zeros((len(members), branches), dtype=np.uint8)
    if len(members):
        np.put_along_axis(words, members, 1, axis=1)
    return words


@lru_cache(maxsize=4)
def all_words(branches: int, active: int) -> Words:
    """Returns all words of length N and weight A, in lexicographic order of their sets;
    read-only."""
    words = from_sets(combinations(range(branches), active), branches)
    words.setflags(write=False)
    return words


def overlaps(words: Words, others: Words) -> npt.NDArray[np.float32]:
    """Returns `[K, L]` numbers of common branches; exact, as they are integers far below 2^24."""
    return words.astype(np.float32) @ others.astype(np.float32).T


def distance_histogram(words: Words) -> dict[int, int]:
    """Returns the number of pairs of rows at each distance, ascending, in less than 100 MB."""
    active, branches = int(words[0].sum()), words.shape[1]
    rows = words.astype(np.float32)
    counts = np.zeros(branches + 1, dtype=np.int64)
    step = max(1, CHUNK_ENTRIES // len(rows))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        # Pairs inside the block appear twice, each row also beside itself; later rows once.
        inside = np.bincount((block @ block.T).astype(np.intp).ravel(), minlength=branches + 1)
        inside[active] -= len(block)
        counts += inside // 2
        later = (block @ rows[start + step :].T).astype(np.intp)
        counts += np.bincount(later.ravel(), minlength=branches + 1)
    return {
        2 * (active - overlap): int(counts[overlap])
        for overlap in range(active, -1, -1)
        if counts[overlap]
    }


def first_duplicate(words: Words) -> tuple[int, int] | None:
    """Returns the indices of two equal rows, the first such pair in reading order."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate(np.packbits(words, axis=1)):
        first = seen.setdefault(row.tobytes(), index)
        if first != index:
            return first, index
    return None


def is_balanced(words: Words) -> bool:
    """Returns whether the column sums differ by one at most."""
    loads = words.sum(axis=0, dtype=np.int64)
    return int(loads.max() - loads.min()) <= 1
