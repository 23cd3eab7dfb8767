"""The paper's evaluation of a network, all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..models import CodedResNeXt
from .early_decoding import EarlyDecoding, decode_early
from .one_class import OneClass, OneClassClassifier, one_class
from .paths import Paths, measure_paths
from .removal import Removal, remove_branches
from .running import Loader, batches, evaluating

FORMAT_VERSION = 1
# Rows of the table of classes; of more classes the worst are shown.
TABLE_CLASSES = 20


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found; a plain network has an accuracy alone, and None for the rest."""

    class_names: tuple[str, ...]
    test_samples: int
    test_accuracy: float
    """Share of the test images that are classified correctly, 0 to 1."""
    early_decoding: EarlyDecoding | None = None
    removal: Removal | None = None
    one_class: OneClass | None = None
    paths: Paths | None = None
    thresholds_from: Literal["training data", "test data"] = "training data"
    """The data on which the thresholds of the one-class classifiers were chosen."""

    @property
    def is_coded(self) -> bool:
        """Whether the network has coded blocks, and so more than an accuracy."""
        return self.early_decoding is not None

    def summary(self) -> dict[str, Any]:
        """The headline numbers; the lists of a plain network are empty.

        `test_accuracy`; by coded block `early_decoding` (accuracy), `remove_active_accuracy` and
        `remove_inactive_accuracy` (all branches of the kind removed); by class
        `single_class_average_precision`, None where a class has no test image. Shares, 0 to 1.
        """
        blocks = self.removal.blocks if self.removal else ()
        return {
            "test_accuracy": self.test_accuracy,
            "early_decoding": list(
                self.early_decoding.block_accuracy if self.early_decoding else ()
            ),
            "single_class_average_precision": list(
                self.one_class.average_precisions if self.one_class else ()
            ),
            "remove_active_accuracy": [block.active.accuracy[-1] for block in blocks],
            "remove_inactive_accuracy": [block.inactive.accuracy[-1] for block in blocks],
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description of everything; what does not apply is None."""
        return {
            "format_version": FORMAT_VERSION,
            "class_names": list(self.class_names),
            "test_samples": self.test_samples,
            "test_accuracy": self.test_accuracy,
            "early_decoding": self.early_decoding.to_dict() if self.early_decoding else None,
            "removal": self.removal.to_dict() if self.removal else None,
            "one_class": self.one_class.to_dict() if self.one_class else None,
            "paths": self.paths.to_dict() if self.paths else None,
            "thresholds_from": self.thresholds_from if self.one_class else None,
        }

    def __str__(self) -> str:
        """Tables for a person to read."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"Test accuracy {_percent(self.test_accuracy)} on {self.test_samples} images."
        if not (self.early_decoding and self.removal and self.one_class):
            yield "A plain network: without coded blocks there is nothing more to evaluate."
            return
        accuracy, blocks = self.test_accuracy, self.removal.blocks
        yield ""
        yield _row("Coded block", [str(index) for index in range(1, len(blocks) + 1)])
        yield _row("Early decoding: accuracy", map(_percent, self.early_decoding.block_accuracy))
        yield _row(
            "Early decoding: agrees with output", map(_percent, self.early_decoding.block_agreement)
        )
        yield _row(
            "All active branches removed, points",
            [_points(block.active.accuracy[-1] - accuracy) for block in blocks],
        )
        yield _row(
            "All inactive branches removed, points",
            [_points(block.inactive.accuracy[-1] - accuracy) for block in blocks],
        )
        yield ""
        yield from _class_table(self.one_class)
        if self.thresholds_from == "training data":
            yield "Thresholds: best F1 on the training data."
        else:
            yield "Thresholds: best F1 on the test data itself, as no training data is at hand;"
            yield "precision, recall and F1 are optimistic."


def evaluate(
    model: CodedResNeXt,
    train_loader: Loader | None,
    test_loader: Loader,
    *,
    seed: int = 0,
    repeats: int = 5,
) -> Evaluation:
    """Accuracy, early decoding, removal of branches, one-class classifiers and paths.

    Args:
        model: the network, on any device; its mode is left as found.
        train_loader: batches `(images [B, C, H, W], targets [B])` without augmentation, for the
            thresholds of the one-class classifiers; None chooses them on the test data.
        test_loader: batches of the data on which everything is measured.
        seed: of the random branch removals, at least 0.
        repeats: of the random branch removals, at least 1.

    Returns:
        The results; only the accuracy for a network without coded blocks.

    Raises:
        ValueError: a loader has no batch, cannot be iterated twice or does not fit the model, or
            a number is outside its range.
        ImportError: scikit-learn is not installed.
    """
    for name, loader in (("train_loader", train_loader), ("test_loader", test_loader)):
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{name}: expected batches that can be iterated again and again, got an iterator"
            )
    if not model.coded_blocks:
        samples, accuracy = _accuracy(model, test_loader)
        return Evaluation(model.class_names, samples, accuracy)
    early = decode_early(model, test_loader)
    return Evaluation(
        class_names=model.class_names,
        test_samples=early.samples,
        test_accuracy=early.accuracy,
        early_decoding=early,
        removal=remove_branches(model, test_loader, seed=seed, repeats=repeats),
        one_class=one_class(
            model, test_loader if train_loader is None else train_loader, test_loader
        ),
        paths=measure_paths(model, test_loader),
        thresholds_from="test data" if train_loader is None else "training data",
    )


def _accuracy(model: CodedResNeXt, loader: Loader) -> tuple[int, float]:
    """The number of images and the share of them that is classified correctly."""
    samples = correct = 0
    with evaluating(model):
        for images, targets in batches(model, loader, "accuracy"):
            samples += len(targets)
            correct += int((model(images).argmax(1) == targets).sum())
    return samples, correct / samples


def _class_table(result: OneClass) -> Iterator[str]:
    shown: Sequence[OneClassClassifier] = result.classifiers
    heading = "One-class classifier"
    if len(shown) > TABLE_CLASSES:
        shown = sorted(
            (one for one in shown if one.average_precision is not None),
            key=lambda one: one.average_precision or 0.0,
        )[:TABLE_CLASSES]
        heading = f"The {len(shown)} weakest one-class"
    width = 11
    yield _row(heading, ["images", "avg. prec.", "precision", "recall", "F1"], width)
    for one in shown:
        numbers = (one.average_precision, one.precision, one.recall, one.f1)
        yield _row(
            f"  {one.class_name}"[:_LABEL], [str(one.positives), *map(_fraction, numbers)], width
        )
    known = [one for one in result.classifiers if one.average_precision is not None]
    yield _row(
        "Mean average precision",
        ["", _fraction(result.mean_average_precision)],
        width,
    ) + (f"  ({len(known)} of {len(result.classifiers)} classes)")


_LABEL = 38


def _row(label: str, cells: Iterator[str] | Sequence[str] | map[str], width: int = 9) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _fraction(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
