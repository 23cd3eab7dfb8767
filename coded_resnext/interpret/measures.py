"""Measures of a yes-or-no classifier from its scores, by scikit-learn; None is "not available"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 30
# Points of a curve that are kept; of more, an even choice.
MOST_POINTS = 256
# Kept besides those at which recall changes: between two of these precision may change a lot.
EVEN_POINTS = 48
Flags = NDArray[np.bool_]
Scores = NDArray[Any]


@dataclass(frozen=True)
class Histogram:
    """Scores counted in bins of equal width."""

    edges: tuple[float, ...]
    """One more than there are bins, ascending."""
    positives: tuple[int, ...]
    """Images of the class, by bin."""
    negatives: tuple[int, ...]
    """Images of other classes, by bin."""
    outside: tuple[int, ...]
    """Images of none of the classes, by bin."""


@dataclass(frozen=True)
class Curve:
    """Precision and recall at thresholds, which rise while recall falls.

    Kept are the ends, points next to which recall changes, and an even choice of the others; of a
    long curve an even choice of all.
    """

    precision: tuple[float, ...]
    recall: tuple[float, ...]
    thresholds: tuple[float | None, ...]
    """Scores of at least this say yes; None at the last point, where nothing does."""


def average_precision(scores: Scores, positive: Flags) -> float | None:
    """Average precision; None unless there are two positives and a negative.

    Of a single positive it would be one over its rank: a statement about one image, not about a
    classifier.

    Args:
        scores: `[n]`.
        positive: `[n]`, whether an image is of the class.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    metrics = _metrics()
    if positive.sum() < 2 or not _both(positive):
        return None
    return float(metrics.average_precision_score(positive, scores))


def sweep(scores: Scores, positive: Flags, points: int = MOST_POINTS) -> Curve | None:
    """Precision and recall at many thresholds; None unless there are positives and negatives.

    Args:
        scores, positive: as `average_precision`.
        points: the most that are kept.
    """
    if not _both(positive):
        return None
    precision, recall, thresholds = _metrics().precision_recall_curve(positive, scores)
    steps = np.flatnonzero(np.diff(recall))
    every = np.arange(len(recall))
    kept = np.unique(np.concatenate([steps, steps + 1, _even(every, EVEN_POINTS)]))
    kept = _even(kept, points)
    known = [*thresholds.tolist(), None]
    return Curve(
        tuple(precision[kept].tolist()),
        tuple(recall[kept].tolist()),
        tuple(known[index] for index in kept.tolist()),
    )


def best_threshold(scores: Scores, positive: Flags) -> float | None:
    """The lowest of the thresholds with the best F1, where a score of at least it says yes.

    Returns:
        A score that occurs; None unless there are positives and negatives.
    """
    if not _both(positive):
        return None
    precision, recall, thresholds = _metrics().precision_recall_curve(positive, scores)
    precision, recall = precision[:-1], recall[:-1]
    # Every threshold is a score, so something is found: precision + recall is 0 only with F1 = 0.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return float(thresholds[f1.argmax()])


def at_threshold(
    scores: Scores, positive: Flags, threshold: float | None
) -> tuple[float | None, float | None, float | None]:
    """Precision, recall and F1 where scores of at least the threshold say yes.

    None without a threshold, or unless there are positives and negatives.
    """
    if threshold is None or not _both(positive):
        return None, None, None
    found = _metrics().precision_recall_fscore_support(
        positive, scores >= threshold, average="binary", zero_division=0
    )
    precision, recall, f1 = (float(value) for value in found[:3])
    return precision, recall, f1


def count(scores: Scores, positive: Flags, outside: Scores) -> Histogram | None:
    """Histograms in common bins, which span the scores; None without any."""
    every = np.concatenate([scores, outside]).astype(np.float64)
    if not len(every):
        return None
    edges = np.histogram_bin_edges(every, BINS)
    groups = (scores[positive], scores[~positive], outside)
    counts = [tuple(np.histogram(group, edges)[0].tolist()) for group in groups]
    return Histogram(tuple(edges.tolist()), *counts)


def _even(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """An even choice of at most so many of the values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(np.int64)
    return values[places]


def _both(positive: Flags) -> bool:
    return bool(positive.any()) and not bool(positive.all())


def _metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(
            "one-class classifiers need scikit-learn; install coded-resnext[report]"
        ) from error
    return metrics
