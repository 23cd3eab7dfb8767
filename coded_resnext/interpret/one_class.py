"""One-class classifiers: a network reduced to the branches of one class answers yes or no.

Without the branches of the other classes the logit of the class is the score, (10). K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coded_resnext.data.image_sets import by_class
from coded_resnext.models.resnext import CodedResNeXt

from .observe import (
    Loader,
    Part,
    read_targets,
    require_at_least,
    require_coded_blocks,
    resume_with_energies,
    stream,
    without_targets,
)

Role = Literal["threshold", "test", "outside"]
"""Data on which thresholds are chosen, on which is tested, and of none of the classes."""
ROLES: tuple[Role, Role, Role] = ("threshold", "test", "outside")
# From so many classes on, each is tested against some of the others' images, as in the paper.
MANY_CLASSES = 100
PAPER_NEGATIVES = 9
# Of more images of other classes some are drawn without looking at the others.
FEW_OTHERS = 10_000
BINS = 30
# Points of a curve that are kept, of more an even choice; and of one of many classes, so that a
# file of 1,000 classes stays small.
MOST_POINTS, MANY_POINTS = 256, 64
# Points that are kept besides those at which recall changes: between two of these precision may
# change a lot.
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


@dataclass(frozen=True)
class Outside:
    """A classifier's test images of the class against images of none of the classes; None is "not
    available"."""

    samples: int
    average_precision: float | None
    """Average precision of telling test images of the class from these."""
    accepted: float | None
    """Share of these that reach the threshold."""
    precision: float | None = None
    """Precision at the threshold; 0 where no image reaches it."""
    recall: float | None = None
    """Recall at the threshold, which is that among the classes."""
    f1: float | None = None
    """F1 at the threshold."""
    balanced_accuracy: float | None = None
    """Mean of the recall and of the share of these that do not reach the threshold."""


@dataclass(frozen=True)
class OneClassClassifier:
    """How well one class is told from the others; None is "not available"."""

    class_name: str
    computed: bool
    """Says whether the class is among those that were drawn; if not, nothing else says anything."""
    positives: int = 0
    """Test images of the class."""
    negatives: int = 0
    """Test images of other classes that were scored."""
    average_precision: float | None = None
    """Average precision on the test images; None unless there are two positives and a negative."""
    curve: Curve | None = None
    """Precision and recall on the test images; None unless there are positives and negatives."""
    threshold: float | None = None
    """Scores of at least this say yes: best F1 on the threshold images (of equal ones the lowest);
    None unless those have positives and negatives."""
    threshold_f1: float | None = None
    """F1 at the threshold on the images on which it was chosen."""
    precision: float | None = None
    """Precision on the test images at the threshold; 0 where no image reaches it."""
    recall: float | None = None
    """Recall on the test images at the threshold."""
    f1: float | None = None
    """F1 on the test images at the threshold."""
    balanced_accuracy: float | None = None
    """Mean of the recall and of the share of other classes' test images below the threshold."""
    dead: float | None = None
    """Share of the scored test images for which some coded block had no energy left: its branches
    of this class are silent, and the score does not depend on the block."""
    histogram: Histogram | None = None
    """Scores of the test images, and of those outside."""
    outside: Outside | None = None
    """The classifier on images of none of the classes; None where there are no such."""


@dataclass(frozen=True)
class OneClass:
    """The one-class classifiers of all classes."""

    classifiers: tuple[OneClassClassifier, ...]
    """One classifier for each class, in the order of the logits."""
    negatives_per_positive: int | None
    """Images of other classes scored for each one of the class; None for all there are."""
    seed: int
    """Seed of the draws of classes and of images of other classes."""

    @property
    def average_precisions(self) -> tuple[float | None, ...]:
        """Returns the average precision by class, None where it is not available."""
        return tuple(classifier.average_precision for classifier in self.classifiers)

    @property
    def mean_average_precision(self) -> float | None:
        """Returns the mean over the classes that have one; None if none has."""
        known = [value for value in self.average_precisions if value is not None]
        return math.fsum(known) / len(known) if known else None

    @classmethod
    def of(
        cls,
        class_names: Sequence[str],
        test: ClassScores,
        threshold: ClassScores | None = None,
        outside: ClassScores | None = None,
        *,
        negatives_per_positive: int | None = None,
        seed: int = 0,
    ) -> OneClass:
        """Tests the classifiers of the classes that were scored.

        Args:
            class_names: names of all classes, in the order of the logits.
            test: scores of the images on which everything but the thresholds is measured.
            threshold: scores on which the thresholds are chosen; None chooses them on the test
                images.
            outside: scores of images of none of the classes.
            negatives_per_positive: how many pairs were drawn, noted in the result.
            seed: what the pairs were drawn by, noted in the result.
        """
        points = MANY_POINTS if len(class_names) > MANY_CLASSES else MOST_POINTS
        classifiers = (
            _classifier(name, index, test, threshold or test, outside, points)
            if index in test.classes
            else OneClassClassifier(name, computed=False)
            for index, name in enumerate(class_names)
        )
        return cls(tuple(classifiers), negatives_per_positive, seed)


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Scores of p pairs of an image and a class, all on the CPU."""

    classes: tuple[int, ...]
    """The classes whose classifiers were computed."""
    targets: Tensor
    """True classes of all n images, `[n]`; -1 for images of none of the classes."""
    rows: Tensor
    """The image of each pair, `[p]`; those of one class ascend."""
    columns: Tensor
    """The class of each pair, `[p]`."""
    scores: Tensor
    """The logit of the class from its own branches alone, `[p]`."""
    dead: Tensor
    """Says whether some coded block had no energy left, `[p]`."""

    @cached_property
    def _pairs(self) -> dict[int, Any]:
        """Returns the pairs of every class."""
        return by_class(self.columns)

    def of_class(self, index: int) -> tuple[Scores, Flags, Flags]:
        """Returns a class's scores, whether each is of the class, and whether its image is dead."""
        pairs = torch.from_numpy(self._pairs.get(index, np.empty(0, np.int64)))
        positive = self.targets[self.rows[pairs]] == index
        return self.scores[pairs].numpy(), positive.numpy(), self.dead[pairs].numpy()


def one_class(
    model: CodedResNeXt,
    threshold_loader: Loader,
    test_loader: Loader,
    *,
    outside_loader: Loader | None = None,
    classes: int | None = None,
    negatives_per_positive: int | None = None,
    seed: int = 0,
) -> OneClass:
    """Turns the network into a yes-or-no classifier for every class and tests each.

    Args:
        model: with at least one coded block; its mode is left as found.
        threshold_loader: training data, on which the thresholds are chosen.
        test_loader: data on which everything else is measured. The same object as
            `threshold_loader` is scored once.
        outside_loader: images of none of the classes; their targets do not matter.
        classes: how many classes get a classifier, drawn by seed; None for all.
        negatives_per_positive: images of other classes scored for each image of the class, drawn
            anew for every class; None scores all.
        seed: decides these draws; at least 0.

    Raises:
        ValueError, ImportError: as `score_classes`.
    """
    chosen = draw_classes(model.num_classes, classes, seed)
    options: dict[str, Any] = {"negatives_per_positive": negatives_per_positive, "seed": seed}
    test = score_classes(model, test_loader, "test", classes=chosen, **options)
    threshold = outside = None
    if threshold_loader is not test_loader:
        threshold = score_classes(model, threshold_loader, "threshold", classes=chosen, **options)
    if outside_loader is not None:
        outside = score_classes(
            model, outside_loader, "outside", classes=chosen, test=test, **options
        )
    return OneClass.of(model.class_names, test, threshold, outside, **options)


def paper_negatives(classes: int) -> int | None:
    """Returns how many images of other classes the paper tests a classifier with for each positive.

    That is 9 for CIFAR-100 and ImageNet (footnote 8), and None, all of them, for CIFAR-10.
    """
    return PAPER_NEGATIVES if classes >= MANY_CLASSES else None


def draw_classes(classes: int, count: int | None, seed: int) -> tuple[int, ...]:
    """Returns so many of the classes 0, 1, .., drawn by seed; all of them for None.

    Raises:
        ValueError: a number is outside its range.
    """
    require_at_least(1, classes=count)
    require_at_least(0, seed=seed)
    return tuple(np.random.default_rng((seed, 2)).permutation(classes)[:count].tolist())


def score_classes(
    model: CodedResNeXt,
    loader: Loader,
    role: Role,
    *,
    classes: Sequence[int] | None = None,
    negatives_per_positive: int | None = None,
    seed: int = 0,
    targets: Tensor | None = None,
    test: ClassScores | None = None,
) -> ClassScores:
    """Scores images for classes, for each class from its branches alone, (10).

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        role: what the images are for; the targets of those outside do not matter.
        classes: the classes whose classifiers score; None for all.
        negatives_per_positive: images of other classes scored for each image of the class, drawn
            anew for every class; None scores all images for all classes.
        seed: decides these draws; at least 0.
        targets: the classes of all images `[n]`, where they are known; otherwise a draw takes a
            pass of its own over a loader that does not tell them.
        test: scores of the test images, whose number decides how many images outside are drawn.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, targets are not class
            indices of the model, a second pass gives other targets, a score is not finite, or a
            number is outside its range.
        ImportError: scikit-learn is not installed, which `OneClass.of` needs.
    """
    require_at_least(1, negatives_per_positive=negatives_per_positive)
    if role == "outside":
        loader = without_targets(loader)
    if negatives_per_positive is not None and targets is None:
        targets = read_targets(model, loader)
    scorer = ClassScorer(
        model,
        role,
        classes=classes,
        negatives_per_positive=negatives_per_positive,
        seed=seed,
        targets=targets,
        test=test,
    )
    activity = f"one-class classifiers, {role} images"
    stream(model, loader, activity, [(scorer.add, None)], known=targets)
    return scorer.result()


class ClassScorer:
    """Gathers what `score_classes` returns, by pairs that are drawn beforehand.

    Arguments that are not listed are those of `score_classes`.

    Args:
        targets: the classes of all images by their positions; None if all of them are scored.
        rows: positions of the images that are scored, ascending; None for all.

    Raises:
        ValueError, ImportError: as `score_classes`.
    """

    def __init__(
        self,
        model: CodedResNeXt,
        role: Role,
        *,
        classes: Sequence[int] | None = None,
        negatives_per_positive: int | None = None,
        seed: int = 0,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        test: ClassScores | None = None,
    ) -> None:
        require_coded_blocks(model.coded_blocks)
        require_at_least(1, negatives_per_positive=negatives_per_positive)
        require_at_least(0, seed=seed)
        _metrics()
        self.model, self.role = model, role
        self.classes = tuple(range(model.num_classes) if classes is None else classes)
        self.rows = rows
        self.pairs: Tensor | None = None
        """Pairs from `_draw_pairs`, of images by their positions in `rows`; None for all pairs."""
        if negatives_per_positive is not None:
            assert targets is not None
            own = targets if rows is None else targets[rows]
            own = torch.full_like(own, -1) if role == "outside" else own
            counted = own if test is None else test.targets
            counts = {index: len(members) for index, members in by_class(counted).items()}
            limits = [negatives_per_positive * counts.get(index, 0) for index in self.classes]
            kind = (seed, 3, ROLES.index(role))
            self.pairs = _draw_pairs(own, self.classes, limits, kind, model.num_classes)
        self._count = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, part: Part) -> None:
        """Takes the next images."""
        count = len(part.positions)
        if self.pairs is None:
            rows = torch.arange(count).repeat(len(self.classes))
            columns = torch.tensor(self.classes).repeat_interleave(count)
        else:
            positions, count_of = part.positions, self.model.num_classes
            if self.rows is not None:
                positions = torch.searchsorted(self.rows, positions)
            ends = torch.stack([positions[0], positions[-1] + 1]) * count_of
            low, high = torch.searchsorted(self.pairs, ends).tolist()
            images, columns = self.pairs[low:high] // count_of, self.pairs[low:high] % count_of
            rows = torch.searchsorted(positions, images)
            # Not those of damaged images, which did not come.
            came = positions[rows] == images
            rows, columns = rows[came], columns[came]
        scores, dead = _score_pairs(self.model, part.features, rows, columns, part.at_a_time)
        self._parts.append((part.targets, rows + self._count, columns, scores, dead))
        self._count += count

    def result(self) -> ClassScores:
        """Returns the scores; ValueError if one is not finite."""
        targets, rows, columns, scores, dead = map(torch.cat, zip(*self._parts, strict=True))
        if not bool(scores.isfinite().all()):
            raise ValueError("scores: expected finite logits of the model, got NaN or infinity")
        if self.role == "outside":
            targets = torch.full_like(targets, -1)
        return ClassScores(self.classes, targets, rows, columns, scores, dead)


def _draw_pairs(
    targets: Tensor,
    classes: Sequence[int],
    limits: Sequence[int],
    seed: tuple[int, ...],
    num_classes: int,
) -> Tensor:
    """Draws pairs of an image and a class: all images of a class, and so many others.

    Returns:
        `[p]`, ascending: of a pair the image times the number of all classes, plus the class. There
        may be ten for an image, so that this is all that is kept of them.
    """
    members = by_class(targets)
    every = [members.get(index, np.empty(0, np.int64)) for index in classes]
    counts = [
        len(own) + min(limit, len(targets) - len(own))
        for own, limit in zip(every, limits, strict=True)
    ]
    pairs, end = np.empty(sum(counts), np.int64), 0
    for index, limit, own, size in zip(classes, limits, every, counts, strict=True):
        count, generator = len(targets) - len(own), np.random.default_rng((*seed, index))
        if limit >= count:
            others = np.arange(count)
        elif count <= FEW_OTHERS:
            others = generator.permutation(count)[:limit]
        else:
            others = generator.choice(count, limit, replace=False, shuffle=False)
        # The k-th image of other classes: so many of the class come before it.
        others = others + np.searchsorted(own - np.arange(len(own)), others, side="right")
        pairs[end : end + size] = np.concatenate([own, others]) * num_classes + index
        end += size
    pairs.sort()
    return torch.from_numpy(pairs)


def _score_pairs(
    model: CodedResNeXt, features: Tensor, positions: Tensor, columns: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Returns the score of each pair, and whether some block has no energy left for it, both `[p]`.

    Args:
        model: in evaluation mode.
        features: inputs of the first coded block, `[B, C, H, W]`.
        positions: for each pair the position of its image among the features, `[p]`.
        columns: for each pair its class, `[p]`.
        batch_size: pairs at a time.
    """
    scores, dead = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    every = torch.arange(len(features))
    for some, asked in zip(
        torch.split(positions, batch_size), torch.split(columns, batch_size), strict=True
    ):
        x = features if torch.equal(some, every) else features[some.to(features.device)]
        asked = asked.to(features.device)
        masks = [block.codewords[asked] for block in model.coded_blocks]
        logits, energies = resume_with_energies(model, x, 0, masks)
        # NumPy, which sorts the scores, has no bfloat16.
        exact = torch.promote_types(logits.dtype, torch.float32)
        scores.append(logits.gather(1, asked[:, None])[:, 0].to("cpu", exact))
        dead.append(torch.stack([energy.sum(1) == 0 for energy in energies], 1).any(1).cpu())
    return torch.cat(scores), torch.cat(dead)


def _classifier(
    name: str,
    index: int,
    test: ClassScores,
    threshold_images: ClassScores,
    outside_images: ClassScores | None,
    points: int,
) -> OneClassClassifier:
    """Returns the classifier of one class, its curve with so many points."""
    scores, positive, dead = test.of_class(index)
    learned_scores, learned_positive, _ = threshold_images.of_class(index)
    threshold = best_threshold(learned_scores, learned_positive)
    outside, outside_scores = None, np.empty(0)
    if outside_images is not None:
        outside_scores = outside_images.of_class(index)[0]
        joined = np.concatenate([scores[positive], outside_scores])
        own = np.arange(len(joined)) < positive.sum()
        accepted = None
        if threshold is not None and len(outside_scores):
            accepted = float((outside_scores >= threshold).mean())
        outside = Outside(
            samples=len(outside_scores),
            average_precision=average_precision(joined, own),
            accepted=accepted,
            **at_threshold(joined, own, threshold)._asdict(),
        )
    return OneClassClassifier(
        class_name=name,
        computed=True,
        positives=int(positive.sum()),
        negatives=int((~positive).sum()),
        average_precision=average_precision(scores, positive),
        curve=sweep(scores, positive, points),
        threshold=threshold,
        threshold_f1=at_threshold(learned_scores, learned_positive, threshold).f1,
        dead=float(dead.mean()) if len(scores) else None,
        histogram=count_scores(scores, positive, outside_scores),
        outside=outside,
        **at_threshold(scores, positive, threshold)._asdict(),
    )


def average_precision(scores: Scores, positive: Flags) -> float | None:
    """Returns the average precision; None unless there are two positives and a negative.

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
    """Returns precision and recall at many thresholds; None for scores of one kind alone.

    Args:
        scores: as for `average_precision`.
        positive: as for `average_precision`.
        points: the most that are kept.
    """
    if not _both(positive):
        return None
    precision, recall, thresholds = _metrics().precision_recall_curve(positive, scores)
    steps = np.flatnonzero(np.diff(recall))
    every = np.arange(len(recall))
    telling = np.unique(np.concatenate([steps, steps + 1, _even(every, EVEN_POINTS)]))
    chosen = _even(telling, points)
    known = [*thresholds.tolist(), None]
    return Curve(
        tuple(precision[chosen].tolist()),
        tuple(recall[chosen].tolist()),
        tuple(known[index] for index in chosen.tolist()),
    )


def best_threshold(scores: Scores, positive: Flags) -> float | None:
    """Returns the lowest of the thresholds with the best F1, where a score of at least it says yes.

    Returns:
        A score that occurs; None unless there are positives and negatives.
    """
    if not _both(positive):
        return None
    thresholds = np.unique(scores)
    accepted = len(scores) - np.searchsorted(np.sort(scores), thresholds)
    of_class = np.sort(scores[positive])
    hits = len(of_class) - np.searchsorted(of_class, thresholds)
    # One division of whole numbers: equal fractions are equal numbers, of which the first counts.
    return float(thresholds[(2 * hits / (accepted + len(of_class))).argmax()])


class AtThreshold(NamedTuple):
    """What a classifier does at its threshold; fields as those of `OneClassClassifier`."""

    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    balanced_accuracy: float | None = None


def at_threshold(scores: Scores, positive: Flags, threshold: float | None) -> AtThreshold:
    """Returns what scores say where those of at least the threshold say yes.

    None without a threshold, or unless there are positives and negatives.
    """
    if threshold is None or not _both(positive):
        return AtThreshold()
    yes = scores >= threshold
    metrics = _metrics()
    numbers = metrics.precision_recall_fscore_support(
        positive, yes, average="binary", zero_division=0
    )
    balanced = metrics.balanced_accuracy_score(positive, yes)
    return AtThreshold(*map(float, (*numbers[:3], balanced)))


def count_scores(scores: Scores, positive: Flags, outside: Scores) -> Histogram | None:
    """Returns histograms in common bins, which span the scores; None without any."""
    every = np.concatenate([scores, outside]).astype(np.float64)
    if not len(every):
        return None
    low, high = float(every.min()), float(every.max())
    # Scores nearer to each other than bins can be told apart share the middle of a wider range.
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    groups = (scores[positive], scores[~positive], outside)
    counts = [tuple(np.histogram(group, edges)[0].tolist()) for group in groups]
    return Histogram(tuple(edges.tolist()), *counts)


def _even(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Returns an even choice of at most so many of the values, the first and the last among
    them."""
    positions = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(np.int64)
    return values[positions]


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
