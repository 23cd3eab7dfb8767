"""Which class gets which codeword, when it is known which classes are alike.

The search makes a set of codewords; any order of them is a codebook of the same quality. With a
similarity `S[K, K]` of the classes, the order can put similar classes on distant codewords (harder
to confuse) or on near ones (they share branches). Shapes: `words[K, N]`, weight A.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .words import Ints, Words

Floats = npt.NDArray[np.float64]

SWEEPS = 60


class Assignment(NamedTuple):
    """An order of codewords.

    Attributes:
        order: `[K]`, class `k` gets the codeword of row `order[k]`.
        before: mean distance of two classes, weighted by their similarity, in the given order.
        after: the same in the new order.
    """

    order: Ints
    before: float
    after: float


def assign(
    words: Words,
    similarity: npt.ArrayLike,
    similar_classes: str = "far",
    seed: int = 0,
    sweeps: int = SWEEPS,
) -> Assignment:
    """Orders the codewords so that similar classes are far apart, or near.

    The objective is `sum S[a, b] d(a, b) / sum S[a, b]` over all pairs of classes. As
    `d(a, b) = 2 (A - <x_a, x_b>)`, with `M = S X` the exchange of the words of a and b changes
    `sum S[a, b] <x_a, x_b>` by `<x_b - x_a, M_a - M_b> - S[a, b] |x_b - x_a|^2`: all partners b of
    a class cost one product of `K * N` terms. Each sweep visits the classes in random order and
    makes the best exchange of each; it ends when a sweep finds none.

    Args:
        words: `[K, N]` codewords of equal weight.
        similarity: `[K, K]` matrix of finite numbers >= 0; symmetrised, its diagonal is ignored.
        similar_classes: `"far"` or `"near"`.
        seed: order of the visits.
        sweeps: largest number of sweeps.

    Raises:
        ValueError: an argument is not as described.
    """
    if similar_classes not in ("far", "near"):
        raise ValueError(f"similar_classes: expected 'far' or 'near', got {similar_classes!r}")
    S = _checked_similarity(similarity, len(words))
    sign = 1.0 if similar_classes == "near" else -1.0
    X = words.astype(np.float64)
    order = np.arange(len(words))
    active = float(X[0].sum())
    weight = float(S.sum())

    def mean_distance() -> float:
        return 2 * (active - float((S @ X * X).sum()) / weight)

    before = mean_distance()
    M = S @ X
    random = Random(seed)  # noqa: S311
    for _ in range(sweeps):
        exchanged = False
        for a in sorted(range(len(X)), key=lambda index: random.random()):
            step = X - X[a]
            gain = sign * ((step * (M[a] - M)).sum(axis=1) - S[a] * (step**2).sum(axis=1))
            b = int(np.argmax(gain))
            if gain[b] > 1e-9 * weight:
                M += np.outer(S[:, a] - S[:, b], step[b])
                X[[a, b]] = X[[b, a]]
                order[[a, b]] = order[[b, a]]
                exchanged = True
        if not exchanged:
            break
    return Assignment(order, before, mean_distance())


def similarity_from_confusions(confusions: npt.ArrayLike) -> Floats:
    """Returns how often two classes are mixed up, `[K, K]`, from counts `[true, predicted]`.

    Rows are divided by their sums, so that rare classes count like frequent ones.
    """
    counts = np.asarray(confusions, dtype=np.float64)
    _check_square("confusions", counts)
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
    return _without_diagonal(rates + rates.T)


def similarity_from_embeddings(embeddings: npt.ArrayLike) -> Floats:
    """Returns the cosine of two classes' vectors `[K, features]`, at least 0, as `[K, K]`."""
    vectors = np.asarray(embeddings, dtype=np.float64)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"embeddings: expected finite numbers [classes, features], got shape {vectors.shape}"
        )
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    return _without_diagonal(np.maximum(vectors @ vectors.T, 0.0))


def similarity_from_paths(paths: Sequence[str], separator: str = "/") -> Floats:
    """Returns `[K, K]` from one path per class in a tree, such as `"animal/mammal/dog"`.

    Wu and Palmer's measure: twice the depth of the last common node over the sum of both depths.
    """
    parts = [path.split(separator) for path in paths]
    result = np.zeros((len(parts), len(parts)))
    for a, first in enumerate(parts):
        for b, second in enumerate(parts[:a]):
            pairs = list(zip(first, second, strict=False))
            shared = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
            result[a, b] = result[b, a] = 2 * shared / (len(first) + len(second))
    return result


def _checked_similarity(similarity: npt.ArrayLike, classes: int) -> Floats:
    try:
        S = np.asarray(similarity, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"similarity: expected a matrix of numbers: {error}") from None
    _check_square("similarity", S)
    if len(S) != classes:
        raise ValueError(f"similarity: expected {classes} x {classes} numbers, got shape {S.shape}")
    S = _without_diagonal((S + S.T) / 2)
    if not S.any():
        raise ValueError("similarity: expected some classes to be similar, got zeros only")
    return S


def _check_square(name: str, matrix: Floats) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: expected a square matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        raise ValueError(f"{name}: expected finite numbers >= 0")


def _without_diagonal(matrix: Floats) -> Floats:
    result = matrix.copy()
    np.fill_diagonal(result, 0.0)
    return result
