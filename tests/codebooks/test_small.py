"""Every size with few branches: bounds and search agree with each other."""

from math import comb

import pytest

from coded_resnext.codebooks.bounds import codebook_bounds
from coded_resnext.codebooks.search import search
from coded_resnext.codebooks.words import distance_histogram


@pytest.mark.parametrize("branches", range(2, 7))
def test_all_sizes(branches):
    for active in range(1, branches):
        for classes in range(2, comb(branches, active) + 1):
            words = search(classes, branches, active, "fast").words
            bounds = codebook_bounds(classes, branches, active, distance_histogram(words), True)
            assert bounds.distance_found <= bounds.distance
            assert bounds.pairs <= bounds.pairs_found
            # All words of a size are the only codebook: the bounds are met.
            if classes == comb(branches, active):
                assert bounds.optimal_distance
