"""How well a codebook tells classes apart when branches decide wrongly.

The model: every branch says "active" or "not active" for an image, each independently wrong with
probability p, and the class with the nearest codeword is chosen (ties are broken evenly).
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np

from .words import CHUNK_ENTRIES, Words, distance_histogram


class Quality(NamedTuple):
    """Distances, loads and errors of a codebook.

    Attributes:
        distances: number of pairs of classes at each distance, ascending.
        column_loads: for each branch, the number of classes that it works for.
        flip_probability: the probability `p` of a wrong branch.
        error_bound: upper bound (union bound) on the probability of a wrong class.
        error: the probability of a wrong class, estimated from random errors.
        standard_error: standard deviation of that estimate.
    """

    distances: dict[int, int]
    column_loads: tuple[int, ...]
    flip_probability: float
    error_bound: float
    error: float
    standard_error: float


def quality(
    words: Words, flip_probability: float = 0.1, trials: int = 10_000, seed: int = 0
) -> Quality:
    """Measure a codebook `[K, N]`.

    Args:
        words: codewords of equal weight.
        flip_probability: `p`, from 0 to 0.5.
        trials: random patterns of wrong branches.
        seed: the estimate depends on the seed and nothing else.

    Raises:
        ValueError: the probability or the number of trials is out of range.
    """
    if not 0 <= flip_probability <= 0.5:
        raise ValueError(f"flip_probability: expected 0 to 0.5, got {flip_probability}")
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    distances = distance_histogram(words)
    error, deviation = _simulated_error(words, flip_probability, trials, seed)
    return Quality(
        distances,
        tuple(words.sum(axis=0, dtype=np.int64).tolist()),
        flip_probability,
        min(1.0, _union_bound(distances, len(words), flip_probability)),
        error,
        deviation,
    )


def _union_bound(distances: dict[int, int], classes: int, p: float) -> float:
    """Returns the sum over the other classes of the probability that theirs is the nearer word.

    Only the d digits in which two words differ count: more than d/2 must be wrong, and exactly d/2
    lose every other time.
    """

    def confused(distance: int) -> float:
        def wrong(count: int) -> float:
            return float(comb(distance, count) * p**count * (1 - p) ** (distance - count))

        half = distance // 2
        return wrong(half) / 2 + sum(wrong(count) for count in range(half + 1, distance + 1))

    return sum(2 * pairs * confused(distance) for distance, pairs in distances.items()) / classes


def _simulated_error(words: Words, p: float, trials: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    K, N = words.shape
    rows = words.astype(np.float32)
    failures = np.empty(trials)
    step = max(1, CHUNK_ENTRIES // K)
    for start in range(0, trials, step):
        stop = min(start + step, trials)
        classes = rng.integers(K, size=stop - start)
        decisions = words[classes] ^ (rng.random((stop - start, N)) < p)
        # All codewords have one weight, so the nearest has most ones in common with the decisions.
        common = decisions.astype(np.float32) @ rows.T
        own = common[np.arange(len(classes)), classes][:, None]
        ties = np.count_nonzero(common == own, axis=1)
        failures[start:stop] = np.where((common > own).any(axis=1), 1.0, 1.0 - 1.0 / ties)
    return float(failures.mean()), float(failures.std() / trials**0.5)
