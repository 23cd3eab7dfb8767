"""The general search: valid, balanced, deterministic, and as good as promised."""

from math import comb

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from coded_resnext.codebooks import search as module
from coded_resnext.codebooks.bounds import distance_bound
from coded_resnext.codebooks.search import search
from coded_resnext.codebooks.words import first_duplicate, is_balanced


def check(actual, classes, branches, active):
    """Everything a codebook must be, and the distance that the search claims."""
    words = actual.words
    assert words.shape == (classes, branches)
    assert words.dtype == np.uint8
    assert set(np.unique(words)) <= {0, 1}
    assert (words.sum(axis=1) == active).all()
    assert first_duplicate(words) is None
    loads = words.sum(axis=0, dtype=int)
    assert loads.max() - loads.min() <= 1
    gram = words.astype(float) @ words.T
    distances = 2 * (active - gram[np.triu_indices(classes, 1)])
    assert distances.min() == actual.distance
    assert (distances == actual.distance).sum() == actual.pairs
    assert 2 <= actual.distance <= distance_bound(classes, branches, active)


@pytest.mark.long
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_any_feasible_size(data):
    branches = data.draw(st.integers(2, 20), "branches")
    active = data.draw(st.integers(1, branches - 1), "active")
    classes = data.draw(st.integers(2, min(150, comb(branches, active))), "classes")
    check(search(classes, branches, active, "fast"), classes, branches, active)


@settings(max_examples=100, derandomize=True)
@given(data=st.data())
def test_any_infeasible_size(data):
    branches = data.draw(st.integers(1, 20), "branches")
    active = data.draw(st.integers(1, branches), "active")
    more = comb(branches, active) + data.draw(st.integers(1, 1000), "more")
    assume(more >= 2)
    with pytest.raises(ValueError, match=f"have only {comb(branches, active)} different codewords"):
        search(more, branches, active)


@pytest.mark.parametrize(
    ("size", "distance", "pairs"),
    [
        ((10, 10, 3), 4, 30),
        ((10, 10, 5), 4, 10),
        ((100, 20, 4), 4, 680),
        ((365, 32, 8), 8, None),
        ((1000, 32, 8), 6, None),
        ((1000, 32, 16), 10, 15_000),
    ],
    ids=str,
)
def test_default_effort(size, distance, pairs):
    actual = search(*size)
    check(actual, *size)
    assert actual.distance >= distance
    assert pairs is None or actual.distance > distance or actual.pairs <= pairs


def test_many_classes():
    actual = search(3000, 64, 16, "fast")
    check(actual, 3000, 64, 16)
    assert actual.distance >= 12


def test_more_than_64_branches():
    actual = search(40, 100, 50, "fast")
    check(actual, 40, 100, 50)
    assert actual.distance >= 36


@pytest.mark.parametrize("size", [(37, 13, 5), (101, 20, 6), (60, 9, 4)])
def test_same_seed_same_bits(size):
    first, again = search(*size, effort="fast", seed=3), search(*size, effort="fast", seed=3)
    assert (first.words == again.words).all()


def test_seeds_differ():
    first, other = search(37, 13, 5, "fast", 0), search(37, 13, 5, "fast", 1)
    assert (first.words != other.words).any()


def test_all_words_of_a_size():
    check(search(70, 8, 4, "fast"), 70, 8, 4)


@pytest.mark.parametrize("classes", [69, 66, 35])
def test_nearly_all_words_of_a_size(classes):
    check(search(classes, 8, 4, "fast"), classes, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 10, 5), "classes: expected at least 2, got 1"),
        ((10, 0, 5), "branches: expected at least 1, got 0"),
        ((10, 10, 0), "active: expected 1 to 10 of 10 branches, got 0"),
        ((10, 10, 11), "active: expected 1 to 10 of 10 branches, got 11"),
        ((7, 4, 2), "only 6 different codewords, got 7 classes"),
        ((2, 4, 4), "only 1 different codewords, got 2 classes"),
        ((4, 6, 2, "huge"), "effort: expected one of fast, default, thorough, got 'huge'"),
        ((4, 6, 2, "fast", -1), "seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        search(*arguments)


def test_progress_is_told():
    told = []
    actual = search(100, 20, 4, "fast", report=told.append)
    assert any("orbits" in progress.trying for progress in told)
    assert (told[-1].distance, told[-1].pairs) == (actual.distance, actual.pairs)


def test_interrupt_keeps_the_best_so_far(monkeypatch):
    exchange = module.exchange

    def interrupted(*arguments, report):
        exchange(*arguments, report=report)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "exchange", interrupted)
    actual = search(100, 20, 4)
    check(actual, 100, 20, 4)
    assert actual.interrupted
    assert actual.distance == 4


def test_interrupt_before_anything_is_found(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "full_orbits", interrupted)
    actual = search(100, 20, 4)
    check(actual, 100, 20, 4)
    assert actual.interrupted


@pytest.mark.parametrize("seed", range(4))
def test_as_many_words_as_asked_for_where_orbits_have_several_lengths(seed):
    """The exchange of orbits took one of another length where all of a length were taken."""
    for classes in range(8, 14):
        for effort in ("fast", "default") if classes < 10 else ("fast",):
            words = search(classes, 8, 4, effort, seed).words
            assert words.shape == (classes, 8)
            assert first_duplicate(words) is None


@given(st.integers(2, 60), st.integers(2, 40), st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.long
def test_any_size_has_its_number_of_words(classes, branches, data):
    active = data.draw(st.integers(1, branches))
    assume(comb(branches, active) >= classes)
    words = search(classes, branches, active, "fast", data.draw(st.integers(0, 99))).words
    assert words.shape == (classes, branches)
    assert (words.sum(1) == active).all()
    assert first_duplicate(words) is None
    assert is_balanced(words)
