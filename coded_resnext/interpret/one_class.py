"""One-class classifiers: a network reduced to the branches of one class answers yes or no.

Without the branches of the other classes the logit of the class is the score, (10). K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coded_resnext.models.resnext import CodedResNeXt

from .budget import Ledger
from .observe import (
    Gathered,
    Loader,
    Segment,
    evaluating,
    gather_features,
    require_coded_blocks,
    resume_with_energies,
    segments,
)
from .records import describe

Role = Literal["threshold", "test", "outside"]
"""Data on which thresholds are chosen, on which is tested, and of none of the classes."""
ROLES: tuple[Role, Role, Role] = ("threshold", "test", "outside")
# Of more classes than this, each is tested against some of the others' images, as in the paper.
MANY_CLASSES = 100
PAPER_NEGATIVES = 9
# Points of their curves, so that a file of 1,000 classes stays small.
MANY_POINTS = 64


@dataclass(frozen=True)
class Outside:
    """A classifier on images of none of the classes; None is "not available"."""

    samples: int
    average_precision: float | None
    """Of telling test images of the class from these."""
    accepted: float | None
    """Share of these that reach the threshold."""


@dataclass(frozen=True)
class OneClassClassifier:
    """How well one class is told from the others; None is "not available"."""

    class_name: str
    computed: bool
    """Whether there was time for it; if not, nothing else says anything."""
    positives: int = 0
    """Test images of the class."""
    negatives: int = 0
    """Test images of other classes that were scored."""
    average_precision: float | None = None
    """On the test images; None unless there are two positives and a negative."""
    curve: Curve | None = None
    """On the test images; None unless there are positives and negatives."""
    threshold: float | None = None
    """Scores of at least this say yes: best F1 on the threshold images (of equal ones the lowest);
    None unless those have positives and negatives."""
    threshold_f1: float | None = None
    """F1 at the threshold on the images on which it was chosen."""
    precision: float | None = None
    """On the test images at the threshold; 0 where no image reaches it."""
    recall: float | None = None
    """On the test images at the threshold."""
    f1: float | None = None
    """On the test images at the threshold."""
    dead: float | None = None
    """Share of the scored test images for which some coded block had no energy left: its branches
    of this class are silent, and the score does not depend on the block."""
    histogram: Histogram | None = None
    """Scores of the test images, and of those outside."""
    outside: Outside | None = None
    """On images of none of the classes; None where there are no such."""


@dataclass(frozen=True)
class OneClass:
    """The one-class classifiers of all classes."""

    classifiers: tuple[OneClassClassifier, ...]
    """In the order of the logits."""
    negatives_per_positive: int | None
    """Images of other classes scored for each one of the class; None for all there are."""
    seed: int
    """Of the images of other classes."""

    @property
    def average_precisions(self) -> tuple[float | None, ...]:
        """Average precision by class, None where it is not available."""
        return tuple(classifier.average_precision for classifier in self.classifiers)

    @property
    def mean_average_precision(self) -> float | None:
        """Mean over the classes that have one; None if none has."""
        known = [value for value in self.average_precisions if value is not None]
        return math.fsum(known) / len(known) if known else None

    @property
    def computed(self) -> int:
        """The number of classes for which there was time."""
        return sum(classifier.computed for classifier in self.classifiers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        described: dict[str, Any] = describe(self)
        return described


def one_class(
    model: CodedResNeXt,
    threshold_loader: Loader,
    test_loader: Loader,
    *,
    outside_loader: Loader | None = None,
    negatives_per_positive: int | None = None,
    seed: int = 0,
) -> OneClass:
    """Turn the network into a yes-or-no classifier for every class and test each.

    Args:
        model: with at least one coded block; its mode is left as found.
        threshold_loader: training data, on which the thresholds are chosen.
        test_loader: data on which everything else is measured. The same object as
            `threshold_loader` is scored once.
        outside_loader: images of none of the classes; their targets do not matter.
        negatives_per_positive: images of other classes scored for each image of the class, drawn
            anew for every class; None scores all.
        seed: of these draws, at least 0.

    Raises:
        ValueError: the network has no coded block, a loader has no batch, targets are not class
            indices of the model, a score is not finite, or a number is outside its range.
        ImportError: scikit-learn is not installed.
    """
    require_coded_blocks(model)
    loaders: dict[Role, Loader] = {"test": test_loader}
    if threshold_loader is not test_loader:
        loaders["threshold"] = threshold_loader
    if outside_loader is not None:
        loaders["outside"] = without_targets(outside_loader)
    data = {role: gather_features(model, loader, role) for role, loader in loaders.items()}
    work = OneClassWork(model, data, negatives_per_positive=negatives_per_positive, seed=seed)
    for role, loader in loaders.items():
        for segment in segments(model, loader, data[role]):
            for _ in work.steps({role: segment}):
                pass
    return work.result()


def one_class_scores(model: CodedResNeXt, loader: Loader) -> tuple[Tensor, Tensor]:
    """The score of every image for every class, each from the branches of that class alone, (10).

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.

    Returns:
        Scores `[n, K]`, column c the logit c of `model(images, keep=c)`, and the targets `[n]`,
        both on the CPU.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, or targets are not
            class indices of the model.
    """
    require_coded_blocks(model)
    gathered = gather_features(model, loader, "one-class classifiers")
    parts = [
        torch.stack(
            [
                score(model, segment.features, index, gathered.batch_size)[0]
                for index in range(model.num_classes)
            ],
            1,
        )
        for segment in segments(model, loader, gathered)
    ]
    return torch.cat(parts), gathered.targets


def score(
    model: CodedResNeXt, features: Tensor, index: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores `[m]` of one class, and which samples some block has no energy left for, `[m]`.

    Args:
        model: coded.
        features: inputs of the first coded block, `[m, C, H, W]`.
        index: the class.
        batch_size: samples at a time.
    """
    words = [block.codewords[index] for block in model.coded_blocks]
    scores, dead = [], []
    device = next(model.parameters()).device
    with evaluating(model):
        for part in torch.split(features, batch_size):
            masks = [word.expand(len(part), -1) for word in words]
            logits, energies = resume_with_energies(model, part.to(device), 0, masks)
            scores.append(logits[:, index].cpu())
            silent = torch.stack([energy.sum(1) == 0 for energy in energies], 1)
            dead.append(silent.any(1).cpu())
    return torch.cat(scores), torch.cat(dead)


def without_targets(loader: Loader) -> Loader:
    """The images of a loader, all as class 0: images outside the classes have no class here."""
    return _SizedUntargeted(loader) if isinstance(loader, Sized) else _Untargeted(loader)


class OneClassWork:
    """One-class classifiers in steps, each of them one class on one segment of each data set.

    Args:
        model: coded.
        data: what was gathered of `test`, and of `threshold` and `outside` where there are any;
            without `threshold` the thresholds are chosen on the test data.
        negatives_per_positive: as `one_class`.
        seed: of the negatives, and of the order in which classes are computed.
        ledger: finished steps, of this run and of an interrupted one.

    Raises:
        ValueError: a number is outside its range.
        ImportError: scikit-learn is not installed.
    """

    def __init__(
        self,
        model: CodedResNeXt,
        data: Mapping[Role, Gathered],
        *,
        negatives_per_positive: int | None = None,
        seed: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        if negatives_per_positive is not None and negatives_per_positive < 1:
            raise ValueError(
                f"negatives_per_positive: expected at least 1, got {negatives_per_positive}"
            )
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        # Refused here rather than when all the work is done.
        average_precision(np.array([0.0, 1.0]), np.array([False, True]))
        self.model, self.data, self.seed = model, data, seed
        self.negatives_per_positive = negatives_per_positive
        self.ledger = ledger or Ledger()
        self.found: dict[tuple[Role, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.order = np.random.default_rng((seed, 2)).permutation(model.num_classes).tolist()

    def steps(self, segments: Mapping[Role, Segment]) -> Iterator[None]:
        """Score the segments for class after class, in a seeded order."""
        for index in self.order:
            for role, segment in segments.items():
                self._score(role, index, segment)
            yield

    def result(self) -> OneClass:
        """What the steps so far have found."""
        return OneClass(
            tuple(
                self._classifier(index, name) for index, name in enumerate(self.model.class_names)
            ),
            self.negatives_per_positive,
            self.seed,
        )

    def wanted(self, role: Role, index: int) -> Tensor:
        """The samples of a data set that are scored for a class, ascending."""
        targets = self.data[role].targets
        limit = self.negatives_per_positive
        if role == "outside":
            positives = torch.empty(0, dtype=torch.int64)
            others = torch.arange(len(targets))
            scale = int((self.data["test"].targets == index).sum())
        else:
            positives = (targets == index).nonzero()[:, 0]
            others = (targets != index).nonzero()[:, 0]
            scale = len(positives)
        if limit is not None and limit * scale < len(others):
            generator = np.random.default_rng((self.seed, 3, ROLES.index(role), index))
            others = others[generator.permutation(len(others))[: limit * scale]]
        return torch.cat([positives, others]).sort().values

    def _score(self, role: Role, index: int, segment: Segment) -> None:
        places = segment.where(self.wanted(role, index))
        rows = segment.rows[places]
        if not len(rows):
            # Computed, though there is nothing to compute.
            self.found.setdefault((role, index), [])
            return
        key = f"one_class/{role}/{index}/{int(segment.rows[0])}-{len(segment.rows)}"
        stored = self.ledger.get(key)
        if stored is None:
            whole = len(places) == len(segment.rows)
            features = segment.features if whole else segment.features[places]
            scores, dead = score(self.model, features, index, self.data[role].batch_size)
            if not bool(scores.isfinite().all()):
                raise ValueError("scores: expected finite logits of the model, got NaN or infinity")
            self.ledger.put(key, {"scores": scores.tolist(), "dead": dead.nonzero()[:, 0].tolist()})
        else:
            scores = torch.tensor(stored["scores"], dtype=segment.features.dtype)
            dead = torch.zeros(len(rows), dtype=torch.bool)
            dead[stored["dead"]] = True
        self.found.setdefault((role, index), []).append((rows, scores, dead))

    def _scores(self, role: Role, index: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Scores of a class, whether each is a positive, and whether it is of a dead sample."""
        parts = self.found.get((role, index), [])
        if not parts:
            return np.empty(0), np.empty(0, bool), np.empty(0, bool)
        rows, scores, dead = (torch.cat(values) for values in zip(*parts, strict=True))
        return scores.numpy(), (self.data[role].targets[rows] == index).numpy(), dead.numpy()

    def _classifier(self, index: int, name: str) -> OneClassClassifier:
        computed = all((role, index) in self.found for role in self.data)
        if not computed:
            return OneClassClassifier(name, computed=False)
        many = self.model.num_classes > MANY_CLASSES
        scores, positive, dead = self._scores("test", index)
        learned: Role = "threshold" if "threshold" in self.data else "test"
        chosen_scores, chosen_positive, _ = self._scores(learned, index)
        threshold = best_threshold(chosen_scores, chosen_positive)
        threshold_f1 = at_threshold(chosen_scores, chosen_positive, threshold)[2]
        precision, recall, f1 = at_threshold(scores, positive, threshold)
        outside, outside_scores = None, np.empty(0)
        if "outside" in self.data:
            outside_scores = self._scores("outside", index)[0]
            joined = np.concatenate([scores[positive], outside_scores])
            wanted = np.arange(len(joined)) < positive.sum()
            accepted = None
            if threshold is not None and len(outside_scores):
                accepted = float((outside_scores >= threshold).mean())
            outside = Outside(len(outside_scores), average_precision(joined, wanted), accepted)
        return OneClassClassifier(
            class_name=name,
            computed=computed,
            positives=int(positive.sum()),
            negatives=int((~positive).sum()),
            average_precision=average_precision(scores, positive),
            curve=sweep(scores, positive, MANY_POINTS if many else MOST_POINTS),
            threshold=threshold,
            threshold_f1=threshold_f1,
            precision=precision,
            recall=recall,
            f1=f1,
            dead=float(dead.mean()) if len(scores) else None,
            histogram=count(scores, positive, outside_scores),
            outside=outside,
        )


class _Untargeted:
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, _ in self.loader:
            yield images, torch.zeros(len(images), dtype=torch.int64)


class _SizedUntargeted(_Untargeted):
    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


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
