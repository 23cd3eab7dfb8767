"""One-class classifiers: a network reduced to the branches of one class answers yes or no.

Without the branches of the other classes the logit of the class is the score, (10). K classes,
B samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models import CodedResNeXt
from .running import Loader, batches, block_inputs, evaluating, require_coded_blocks, resume

BINS = 30


@dataclass(frozen=True)
class Histogram:
    """Scores of the test images, counted in bins of equal width."""

    edges: tuple[float, ...]
    """One more than there are bins, ascending."""
    positives: tuple[int, ...]
    """Images of the class, by bin."""
    negatives: tuple[int, ...]
    """Images of all other classes, by bin."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "edges": list(self.edges),
            "positives": list(self.positives),
            "negatives": list(self.negatives),
        }


@dataclass(frozen=True)
class Curve:
    """Precision against recall, recall falling; points that change nothing are left out."""

    precision: tuple[float, ...]
    recall: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {"precision": list(self.precision), "recall": list(self.recall)}


@dataclass(frozen=True)
class OneClassClassifier:
    """How well one class is told from the others; None is "not available"."""

    class_name: str
    positives: int
    """Test images of the class."""
    negatives: int
    """Test images of all other classes."""
    average_precision: float | None
    """On the test images; None unless there are positives and negatives."""
    curve: Curve | None
    """On the test images; None likewise."""
    threshold: float | None
    """Scores of at least this say yes: best F1 on the threshold images (of equal ones the lowest);
    None unless those have positives and negatives."""
    precision: float | None
    """On the test images at the threshold; 0 where no image reaches it."""
    recall: float | None
    """On the test images at the threshold."""
    f1: float | None
    """On the test images at the threshold."""
    histogram: Histogram

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "class_name": self.class_name,
            "positives": self.positives,
            "negatives": self.negatives,
            "average_precision": self.average_precision,
            "curve": None if self.curve is None else self.curve.to_dict(),
            "threshold": self.threshold,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "histogram": self.histogram.to_dict(),
        }


@dataclass(frozen=True)
class OneClass:
    """The one-class classifiers of all classes."""

    classifiers: tuple[OneClassClassifier, ...]
    """In the order of the logits."""

    @property
    def average_precisions(self) -> tuple[float | None, ...]:
        """Average precision by class, None where it is not available."""
        return tuple(classifier.average_precision for classifier in self.classifiers)

    @property
    def mean_average_precision(self) -> float | None:
        """Mean over the classes that have one; None if none has."""
        known = [value for value in self.average_precisions if value is not None]
        return math.fsum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "mean_average_precision": self.mean_average_precision,
            "classifiers": [classifier.to_dict() for classifier in self.classifiers],
        }


def one_class_scores(model: CodedResNeXt, loader: Loader) -> tuple[Tensor, Tensor]:
    """The score of every image for every class, each from the branches of that class alone, (10).

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.

    Returns:
        Scores `[n, K]`, column c the logit c of `model(images, keep=c)`, and the targets `[n]`,
        both on the CPU.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, targets are not class
            indices of the model, or a score is not finite.
    """
    require_coded_blocks(model)
    codewords = [block.codewords for block in model.coded_blocks]
    all_scores, all_targets = [], []
    with evaluating(model):
        for images, targets in batches(model, loader, "one-class classifiers"):
            inputs, _ = block_inputs(model, images)
            columns = []
            for index in range(model.num_classes):
                masks = [words[index].expand(len(images), -1) for words in codewords]
                columns.append(resume(model, inputs[0], 0, masks)[:, index])
            all_scores.append(torch.stack(columns, 1).cpu())
            all_targets.append(targets.cpu())
    scores, classes = torch.cat(all_scores), torch.cat(all_targets)
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: expected finite logits of the model, got NaN or infinity")
    return scores, classes


def one_class(model: CodedResNeXt, threshold_loader: Loader, test_loader: Loader) -> OneClass:
    """Turn the network into a yes-or-no classifier for every class and test each.

    Args:
        model: with at least one coded block; its mode is left as found.
        threshold_loader: training data, on which the thresholds are chosen.
        test_loader: data on which everything else is measured. The same object as
            `threshold_loader` is scored once.

    Raises:
        ValueError: as `one_class_scores`.
        ImportError: scikit-learn is not installed.
    """
    _metrics()
    test_scores, test_targets = one_class_scores(model, test_loader)
    if threshold_loader is test_loader:
        scores, targets = test_scores, test_targets
    else:
        scores, targets = one_class_scores(model, threshold_loader)
    return OneClass(
        tuple(
            assess_classifier(
                name,
                best_threshold(scores[:, index].numpy(), (targets == index).numpy()),
                test_scores[:, index].numpy(),
                (test_targets == index).numpy(),
            )
            for index, name in enumerate(model.class_names)
        )
    )


def best_threshold(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """The lowest of the thresholds with the best F1, where a score of at least it says yes.

    Args:
        scores: `[n]`.
        positive: `[n]`, whether an image is of the class.

    Returns:
        A score that occurs; None unless there are positives and negatives.
    """
    if positive.all() or not positive.any():
        return None
    precision, recall, thresholds = _metrics().precision_recall_curve(positive, scores)
    precision, recall = precision[:-1], recall[:-1]
    # Every threshold is a score, so something is found: precision + recall is 0 only with F1 = 0.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return float(thresholds[f1.argmax()])


def assess_classifier(
    class_name: str,
    threshold: float | None,
    scores: NDArray[Any],
    positive: NDArray[np.bool_],
) -> OneClassClassifier:
    """Measure one classifier on the test scores `[n]` of images that are of the class or not."""
    metrics = _metrics()
    edges = np.histogram_bin_edges(scores.astype(np.float64), BINS)
    average_precision = curve = None
    at_threshold: Sequence[float | None] = (None, None, None)
    if positive.any() and not positive.all():
        average_precision = float(metrics.average_precision_score(positive, scores))
        precision, recall, _ = metrics.precision_recall_curve(
            positive, scores, drop_intermediate=True
        )
        curve = Curve(tuple(precision.tolist()), tuple(recall.tolist()))
        if threshold is not None:
            found = metrics.precision_recall_fscore_support(
                positive, scores >= threshold, average="binary", zero_division=0
            )
            at_threshold = [float(value) for value in found[:3]]
    return OneClassClassifier(
        class_name=class_name,
        positives=int(positive.sum()),
        negatives=int((~positive).sum()),
        average_precision=average_precision,
        curve=curve,
        threshold=threshold,
        precision=at_threshold[0],
        recall=at_threshold[1],
        f1=at_threshold[2],
        histogram=Histogram(
            edges=tuple(edges.tolist()),
            positives=tuple(np.histogram(scores[positive], edges)[0].tolist()),
            negatives=tuple(np.histogram(scores[~positive], edges)[0].tolist()),
        ),
    )


def _metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(
            "one-class classifiers need scikit-learn; install coded-resnext[report]"
        ) from error
    return metrics
