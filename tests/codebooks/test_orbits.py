"""Unions of orbits, trimming and switches against direct counting."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from coded_resnext.codebooks.annealing import anneal, even_out, even_words
from coded_resnext.codebooks.orbits import (
    Accounts,
    abelian,
    enumerate_unions,
    exchange,
    full_orbits,
    images,
    join,
    metacyclic,
    orbits_of,
    short_orbits,
    trim,
)
from coded_resnext.codebooks.words import all_words, distance_histogram, from_sets, is_balanced


def ignore(_):
    pass


def seeded(seed):
    return Random(seed)  # noqa: S311


def test_orbits_are_counted_once_with_their_sizes_and_pairs():
    group = metacyclic(5, 2, 4)
    candidates = orbits_of(all_words(10, 4), group, 2)
    seen = set()
    for word, size, inner in zip(*candidates[:3], strict=True):
        orbit = images(word, group)
        assert len(orbit) == size
        histogram = distance_histogram(orbit) if size > 1 else {8: 0}
        assert min(histogram) >= 4
        assert histogram.get(4, 0) == inner
        seen.add(min(row.tobytes() for row in orbit))
    assert len(seen) == len(candidates.words)
    # None is missing.
    expected = {
        min(row.tobytes() for row in images(word, group))
        for word in all_words(10, 4)
        if min(distance_histogram(images(word, group)), default=8) >= 4
    }
    assert seen == expected


def test_short_orbits_have_the_size():
    group = abelian([4, 8])
    candidates = short_orbits(group, 8, 4, 8, 100, np.random.default_rng(0))
    assert len(candidates.words) > 0
    assert (candidates.sizes == 8).all()
    assert all(len(images(word, group)) == 8 for word in candidates.words)


def test_exchange_and_enumeration_report_true_pairs():
    group = abelian([2, 5])
    rng = np.random.default_rng(0)
    candidates = full_orbits(group, 4, 2, 1000, 1, rng)
    accounts = Accounts(candidates, group)
    reported = []
    union = exchange(accounts, [10, 10], 200, 100, 0, rng, reported.append)
    assert union == reported[-1]
    histogram = distance_histogram(accounts.words(union))
    assert min(histogram) == 4
    assert histogram[4] == union.pairs
    best = enumerate_unions(accounts, 20, 10**6, 0, ignore)
    pairs = []
    for chosen in combinations(range(len(candidates.words)), 2):
        words = np.concatenate([accounts.orbit(index) for index in chosen])
        histogram = distance_histogram(words)
        if len(words) == 20 and min(histogram) >= 4:
            pairs.append(histogram[4])
    assert best.pairs <= min(pairs) <= union.pairs


def test_enumeration_is_exhaustive_over_sizes():
    group = abelian([3, 3])
    candidates = orbits_of(all_words(9, 3), group, 1)
    accounts = Accounts(candidates, group)
    union = enumerate_unions(accounts, 12, 10**6, 0, ignore)
    # The affine plane AG(2, 3) has 12 lines, each two with at most one point in common.
    words = accounts.words(union)
    assert words.shape == (12, 9)
    assert min(distance_histogram(words)) == 4


def test_no_union_is_none():
    group = abelian([10])
    candidates = orbits_of(all_words(10, 5), group, 2)
    assert enumerate_unions(Accounts(candidates, group), 30, 10**6, 0, ignore) is None


@pytest.mark.parametrize("count", [99, 96, 95, 90, 81])
def test_trim_keeps_distance_and_balance(count):
    group = abelian([2, 10])
    rng = np.random.default_rng(0)
    candidates = full_orbits(group, 4, 2, 1000, 1, rng)
    accounts = Accounts(candidates, group)
    union = exchange(accounts, [20] * 5, 100, 100, 0, rng, ignore)
    words = trim(accounts.words(union), count, group, 4, rng)
    assert words.shape == (count, 20)
    assert is_balanced(words)
    assert min(distance_histogram(words)) >= 4


def test_even_words_fill_the_emptiest_branches():
    words = even_words(np.array([3, 0, 0, 0, 3, 0]), 4, 2, seeded(0))
    assert words.sum(axis=0).tolist() == [0, 2, 2, 2, 0, 2]


def test_anneal_keeps_weights_loads_and_fixed_rows():
    start = even_words(np.zeros(12, dtype=np.int64), 18, 4, seeded(0))
    reported = []
    actual = anneal(start, 5, 4, 5000, 0, seeded(1), reported.append)
    assert (actual.words[:5] == start[:5]).all()
    assert (actual.words.sum(axis=1) == 4).all()
    assert is_balanced(actual.words)
    moving = np.triu(np.ones((18, 18), dtype=bool), 1)
    moving[:5, :5] = False
    overlap = (actual.words.astype(int) @ actual.words.T)[moving]
    assert overlap.max() <= 2
    assert (overlap == 2).sum() == actual.pairs
    assert [step.pairs for step in reported] == sorted({s.pairs for s in reported}, reverse=True)


def test_anneal_reaches_the_optimum_of_3_of_10():
    start = even_words(np.zeros(10, dtype=np.int64), 10, 3, seeded(0))
    actual = anneal(start, 0, 4, 20_000, 30, seeded(0), ignore)
    assert actual.pairs == 30


def test_even_out():
    words = all_words(8, 3)[:20]
    assert not is_balanced(words)
    level = even_out(words, 2)
    assert is_balanced(level)
    assert (level.sum(axis=1) == 3).all()
    assert len(np.unique(level, axis=0)) == 20
    assert even_out(from_sets([[0, 1], [0, 2], [0, 3], [0, 4]], 5), 4) is None


def test_join_keeps_everything():
    group = abelian([10])
    parts = [orbits_of(all_words(10, active), group, 2) for active in (3, 3)]
    both = join(parts)
    assert len(both.words) == 2 * len(parts[0].words)
