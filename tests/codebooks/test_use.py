"""What is done with a codebook: growing, assigning to classes, measuring."""

from itertools import permutations

import numpy as np
import pytest

from coded_resnext.codebooks.annealing import grow
from coded_resnext.codebooks.assignment import (
    assign,
    similarity_from_confusions,
    similarity_from_embeddings,
    similarity_from_paths,
)
from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.codebooks.quality import quality
from coded_resnext.codebooks.words import (
    all_words,
    distance_histogram,
    first_duplicate,
    from_sets,
    from_strings,
    is_balanced,
)


def shipped(*size):
    return from_strings(Codebook.shipped(*size).words)


@pytest.mark.parametrize(
    ("size", "count", "distance"),
    [
        ((100, 20, 4), 20, 4),
        ((100, 20, 8), 1, 6),
        ((10, 10, 3), 5, 2),
        pytest.param((1000, 32, 8), 10, 6, marks=pytest.mark.long),
    ],
)
def test_grow(size, count, distance):
    words = shipped(*size)
    grown = grow(words, count)
    assert (grown[: len(words)] == words).all()
    assert grown.shape == (len(words) + count, words.shape[1])
    assert (grown.sum(axis=1) == size[2]).all()
    assert first_duplicate(grown) is None
    assert is_balanced(grown)
    assert min(distance_histogram(grown)) >= distance
    assert (grow(words, count) == grown).all()


def test_grow_to_all_words():
    words = all_words(6, 3)[:12]
    grown = grow(words, 8)
    assert (grown[:12] == words).all()
    assert first_duplicate(grown) is None
    assert (grown.sum(axis=0) == 10).all()


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "expected at least 1, got 0"), (9, "20 different codewords, 12 are in use, got 9 new")],
)
def test_grow_refuses(count, message):
    with pytest.raises(ValueError, match=f"new_classes: .*{message}"):
        grow(all_words(6, 3)[:12], count)


def weighted_distance(words, similarity, order):
    x = words[order].astype(float)
    distances = np.abs(x[:, None] - x[None]).sum(axis=2)
    weights = (similarity + similarity.T) / 2
    np.fill_diagonal(weights, 0)
    return (weights * distances).sum() / weights.sum()


@pytest.mark.parametrize("similar_classes", ["far", "near"])
def test_assign_against_the_definition(similar_classes):
    words = shipped(10, 10, 5)
    similarity = np.random.default_rng(0).random((10, 10))
    result = assign(words, similarity, similar_classes)
    assert sorted(result.order) == list(range(10))
    assert result.before == pytest.approx(weighted_distance(words, similarity, np.arange(10)))
    assert result.after == pytest.approx(weighted_distance(words, similarity, result.order))
    assert (result.after > result.before) == (similar_classes == "far")


def test_assign_finds_the_best_order_of_few_classes():
    words = from_sets([[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]], 5)
    similarity = np.zeros((5, 5))
    similarity[0, 2] = similarity[1, 3] = 1.0
    best = max(
        weighted_distance(words, similarity.copy(), list(order)) for order in permutations(range(5))
    )
    assert assign(words, similarity).after == pytest.approx(best)


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (np.ones((9, 9)), r"similarity: expected 10 x 10 numbers, got shape \(9, 9\)"),
        (np.ones(10), r"similarity: expected a square matrix, got shape \(10,\)"),
        (-np.ones((10, 10)), "similarity: expected finite numbers >= 0"),
        (np.full((10, 10), np.nan), "similarity: expected finite numbers >= 0"),
        (np.eye(10), "similarity: expected some classes to be similar, got zeros only"),
    ],
)
def test_assign_refuses(similarity, message):
    with pytest.raises(ValueError, match=message):
        assign(shipped(10, 10, 5), similarity)


def test_assign_refuses_other_wishes():
    with pytest.raises(ValueError, match="similar_classes: expected 'far' or 'near', got 'up'"):
        assign(shipped(10, 10, 5), np.ones((10, 10)), "up")


def test_similarities():
    confusions = similarity_from_confusions([[8, 2, 0], [1, 1, 0], [0, 0, 5]])
    assert confusions[0, 1] == pytest.approx(0.2 + 0.5)
    assert confusions[0, 2] == confusions[0, 0] == 0
    cosines = similarity_from_embeddings([[1, 0], [1, 1], [-1, 0]])
    assert cosines[0, 1] == pytest.approx(0.5**0.5)
    assert cosines[0, 2] == 0
    tree = similarity_from_paths(["animal/dog", "animal/cat", "thing/car/van"])
    assert tree[0, 1] == pytest.approx(0.5)
    assert tree[0, 2] == 0
    with pytest.raises(ValueError, match="confusions: expected a square matrix"):
        similarity_from_confusions([[1, 2]])
    with pytest.raises(ValueError, match="embeddings: expected finite numbers"):
        similarity_from_embeddings([1, 2])


def exact_error(words, p):
    """All patterns of wrong branches, all classes."""
    K, N = words.shape
    total = 0.0
    for number in range(2**N):
        flips = np.array([number >> j & 1 for j in range(N)], dtype=np.uint8)
        probability = p ** flips.sum() * (1 - p) ** (N - flips.sum())
        for k in range(K):
            distances = (words ^ (words[k] ^ flips)).sum(axis=1)
            nearest = distances == distances.min()
            total += probability * (1 - nearest[k] / nearest.sum()) / K
    return total


def test_quality_against_all_patterns():
    words = from_sets([[0, 1, 2], [2, 3, 4], [0, 4, 5], [1, 3, 5]], 6)
    measured = quality(words, 0.2, trials=40_000)
    exact = exact_error(words, 0.2)
    assert measured.error == pytest.approx(exact, abs=4 * measured.standard_error)
    assert measured.error_bound >= exact
    assert measured.distances == {4: 6}
    assert measured.column_loads == (2,) * 6


def test_the_union_bound_of_two_words_is_exact():
    words = from_sets([[0, 1], [2, 3]], 4)
    assert quality(words, 0.3, trials=1).error_bound == pytest.approx(exact_error(words, 0.3))


def test_no_flips_no_errors():
    assert quality(shipped(10, 10, 5), 0.0)[3:] == (0.0, 0.0, 0.0)


def test_quality_refuses():
    with pytest.raises(ValueError, match=r"flip_probability: expected 0 to 0.5, got 0.7"):
        quality(shipped(10, 10, 5), 0.7)
    with pytest.raises(ValueError, match="trials: expected at least 1, got 0"):
        quality(shipped(10, 10, 5), trials=0)
