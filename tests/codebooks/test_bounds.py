"""Bounds against known values, exhaustive search and every shipped codebook."""

from itertools import combinations

import numpy as np
import pytest

from coded_resnext.codebooks.bounds import distance_bound, johnson_bound, pair_bound
from coded_resnext.codebooks.words import all_words, distance_histogram, is_balanced, overlaps


# From the argument of docs/codebooks.md by hand, or classical values of A(n, d, w).
@pytest.mark.parametrize(
    ("branches", "distance", "active", "bound"),
    [(10, 6, 5, 6), (10, 6, 3, 3), (20, 6, 4, 30), (16, 6, 4, 20), (32, 6, 4, 80), (7, 4, 3, 7)],
)
def test_johnson_bound(branches, distance, active, bound):
    assert johnson_bound(branches, distance, active) == bound
    assert johnson_bound(branches, distance, branches - active) == bound


@pytest.mark.parametrize(
    ("size", "distance"),
    [
        ((10, 10, 5), 4),
        ((100, 20, 8), 8),
        ((100, 16, 8), 6),
        ((1000, 32, 16), 12),
        ((1000, 32, 24), 8),
        ((2, 4, 2), 4),
        ((2, 5, 1), 2),
    ],
)
def test_distance_bound(size, distance):
    assert distance_bound(*size) == distance


@pytest.mark.parametrize(
    ("size", "distance", "pairs"),
    [
        ((10, 10, 3), 4, 30),
        ((10, 10, 5), 4, 10),
        ((100, 20, 4), 4, 660),
        ((100, 20, 16), 4, 660),
        ((100, 16, 4), 4, 1200),
        ((1000, 32, 4), 4, 33312),
    ],
)
def test_pair_bound_is_what_counting_by_hand_gives(size, distance, pairs):
    assert pair_bound(*size, distance) == pairs


# Found by floating-point linear programming elsewhere; whole numbers must not be below.
@pytest.mark.parametrize(
    ("size", "distance", "pairs"),
    [
        ((100, 20, 8), 8, 2399),
        ((100, 16, 8), 6, 1680),
        ((1000, 32, 8), 8, 34040),
        ((1000, 32, 16), 12, 72660),
    ],
)
def test_pair_bound_is_as_strong_as_the_linear_program(size, distance, pairs):
    assert pair_bound(*size, distance) >= pairs


@pytest.mark.parametrize(("classes", "branches", "active"), [(4, 5, 2), (5, 6, 3), (6, 6, 2)])
@pytest.mark.parametrize("balanced", [False, True])
def test_no_codebook_at_all_is_below_the_bounds(classes, branches, active, balanced):
    words = all_words(branches, active)
    best: dict[int, int] = {}
    for rows in combinations(range(len(words)), classes):
        chosen = words[list(rows)]
        if is_balanced(chosen) or not balanced:
            histogram = distance_histogram(chosen)
            distance = min(histogram)
            best[distance] = min(best.get(distance, 10**9), histogram[distance])
    assert max(best) <= distance_bound(classes, branches, active)
    for distance, pairs in best.items():
        bound = pair_bound(classes, branches, active, distance, balanced)
        assert bound is not None
        assert bound <= pairs


def test_impossible_words_are_excluded():
    assert pair_bound(7, 10, 5, 6) is None
    assert pair_bound(1000, 32, 16, 14) is None


def test_histogram_in_blocks_is_the_plain_one(monkeypatch):
    words = all_words(9, 4)
    plain = 2 * (4 - overlaps(words, words)[np.triu_indices(len(words), 1)]).astype(int)
    values, counts = np.unique(plain, return_counts=True)
    monkeypatch.setattr("coded_resnext.codebooks.words.CHUNK_ENTRIES", 1000)
    assert distance_histogram(words) == dict(zip(values.tolist(), counts.tolist(), strict=True))
