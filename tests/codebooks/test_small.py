"""Every size with few branches: search against all codebooks, and against the bounds."""

from itertools import combinations
from math import comb
from random import Random

import numpy as np
import pytest

from coded_resnext.codebooks.bounds import codebook_bounds
from coded_resnext.codebooks.search import search
from coded_resnext.codebooks.words import all_words, distance_histogram, is_balanced


@pytest.mark.parametrize("branches", range(2, 7))
def test_all_sizes(branches):
    for active in range(1, branches):
        for classes in range(2, comb(branches, active) + 1):
            words = search(classes, branches, active, "fast").words
            bounds = codebook_bounds(classes, branches, active, distance_histogram(words), True)
            assert bounds.distance_reached <= bounds.distance
            assert bounds.pairs <= bounds.pairs_reached
            # All words of a size are the only codebook: the bounds are met.
            if classes == comb(branches, active):
                assert bounds.optimal_distance


SIZES = [
    (classes, branches, active)
    for branches in range(2, 7)
    for active in range(1, branches)
    for classes in range(2, min(7, comb(branches, active)) + 1)
    if comb(comb(branches, active), classes) <= 5000
]


@pytest.mark.parametrize(("classes", "branches", "active"), SIZES)
def test_nothing_is_better_than_what_a_search_returns(classes, branches, active):
    """Against every set of words: the largest distance, and the fewest pairs at it."""
    words = all_words(branches, active)
    best = max(
        (min(histogram), -histogram[min(histogram)])
        for chosen in combinations(words, classes)
        if is_balanced(np.stack(chosen))
        for histogram in [distance_histogram(np.stack(chosen))]
    )
    for seed in (0, 1):
        result = search(classes, branches, active, "fast", seed)
        assert (result.distance, -result.pairs) == best


def check(classes, branches, active, seed):
    words = search(classes, branches, active, "fast", seed).words
    assert words.shape == (classes, branches)
    assert (words.sum(axis=1) == active).all()
    assert len(np.unique(words, axis=0)) == classes
    assert is_balanced(words)


@pytest.mark.long
@pytest.mark.parametrize("batch", range(20))
def test_any_size_and_seed(batch):
    random = Random(batch)  # noqa: S311
    for _ in range(20):
        branches = random.randint(2, 16)
        active = random.randint(1, branches - 1)
        classes = random.randint(2, min(60, comb(branches, active)))
        check(classes, branches, active, random.randrange(1000))


@pytest.mark.long
@pytest.mark.parametrize(
    "size", [(2, 1000, 500), (3, 1000, 10), (2000, 64, 32), (500, 1000, 3), (1000, 1000, 1)]
)
def test_the_largest_sizes(size):
    check(*size, 0)
