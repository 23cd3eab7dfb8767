"""An evaluation as tables: text for a person, CSV for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from coded_resnext.files import printable, table_cell

from .evaluate import Evaluation
from .one_class import OneClass, OneClassClassifier
from .provenance import Provenance
from .removal import KINDS, RemovalCurve

# Rows of the table of classes; of more classes the worst are shown.
TABLE_CLASSES = 20
CLASS_MEASURES = (
    *("average_precision", "threshold", "precision", "recall", "f1", "balanced_accuracy", "dead"),
)
OUTSIDE_MEASURES = (
    *("average_precision", "accepted", "precision", "recall", "f1", "balanced_accuracy"),
)
CORRELATIONS = (
    *("codeword_correlation", "confusion_correlation", "confusion_p"),
    "codeword_confusion_correlation",
)
_LABEL = 38


def text(evaluation: Evaluation) -> str:
    """Tables for a person to read."""
    return "\n".join(_lines(evaluation))


def csv_tables(evaluation: Evaluation) -> dict[str, str]:
    """CSV files by name: `classes`, and for a coded network `blocks`, `removal`, `disobedient`.

    `measured_on` says of which images and weights they are.

    Shares are 0 to 1; a cell is empty where something is not available or was not computed.
    """
    tables = {"classes": _classes(evaluation)}
    if evaluation.early_decoding:
        tables["blocks"] = _blocks(evaluation)
    if evaluation.removal:
        tables["removal"] = _removal(evaluation)
    if evaluation.paths:
        tables["disobedient"] = _disobedient(evaluation)
    if evaluation.provenance:
        tables["measured_on"] = _measured_on(evaluation, evaluation.provenance)
    return {f"{name}.csv": _csv(rows) for name, rows in tables.items()}


def _measured_on(evaluation: Evaluation, provenance: Provenance) -> Iterator[dict[str, Any]]:
    for role in ("test", "thresholds", "outside"):
        if (images := getattr(provenance, role)) is not None:
            yield {
                "role": role,
                "data": images.name,
                "split": images.split,
                "images": images.samples,
                "images_sha256": images.sha256,
                "weights_sha256": evaluation.weights_sha256,
                "version": provenance.versions.get("coded_resnext"),
                "date": provenance.date,
            }


def _classes(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    one = evaluation.one_class
    early = evaluation.early_decoding
    for index, name in enumerate(evaluation.class_names):
        row: dict[str, Any] = {
            "class": index,
            "class_name": name,
            "images": evaluation.samples_per_class[index],
            "accuracy": evaluation.classification.class_accuracy[index],
        }
        for number, block in enumerate(early.blocks if early else (), 1):
            row[f"early_decoding_{number}"] = block.class_accuracy[index]
            row[f"early_agreement_{number}"] = block.class_agreement[index]
        if one:
            classifier = one.classifiers[index]
            for name in ("computed", "positives", "negatives"):
                row[f"one_class_{name}"] = getattr(classifier, name)
            row |= {name: getattr(classifier, name) for name in CLASS_MEASURES}
            if evaluation.outside_samples:
                outside = classifier.outside
                for name in OUTSIDE_MEASURES:
                    row[f"outside_{name}"] = getattr(outside, name) if outside else None
        yield row


def _blocks(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    early, paths, semantics = evaluation.early_decoding, evaluation.paths, evaluation.semantics
    assert early is not None
    assert paths is not None
    for index, block in enumerate(early.blocks):
        row: dict[str, Any] = {
            "coded_block": index + 1,
            "early_decoding": block.accuracy,
            "early_decoding_balanced": block.balanced_accuracy,
            "agreement": block.agreement,
            "energy_outside_path": paths.outside[index],
            "disobeying_images": paths.disobeying[index],
        }
        if semantics:
            compared = semantics.blocks[index]
            row |= {name: getattr(compared, name) for name in CORRELATIONS}
        yield row


def _removal(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    assert evaluation.removal is not None
    for number, block in enumerate(evaluation.removal.blocks, 1):
        for kind in KINDS:
            columns = vars(getattr(block, kind))
            for values in zip(*columns.values(), strict=True):
                yield {
                    "coded_block": number,
                    "kind": kind,
                    **dict(zip(columns, values, strict=True)),
                }


def _disobedient(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    assert evaluation.paths is not None
    for image in evaluation.paths.disobedient:
        row: dict[str, Any] = {
            "position": image.position,
            "target": image.target,
            "prediction": image.prediction,
        }
        for number, (decoded, outside) in enumerate(
            zip(image.decoded, image.outside, strict=True), 1
        ):
            row[f"decoded_{number}"] = decoded
            row[f"energy_outside_{number}"] = outside
        yield row


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(buffer, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: table_cell(value) for name, value in row.items()})
    return buffer.getvalue()


def _lines(evaluation: Evaluation) -> Iterator[str]:
    yield str(evaluation)
    if evaluation.provenance is not None:
        yield f"Measured on {printable(evaluation.provenance)}"
    early, removal, paths = evaluation.early_decoding, evaluation.removal, evaluation.paths
    if not (early and removal and paths):
        yield "A plain network: without coded blocks there is nothing more to evaluate."
        return
    blocks = removal.blocks
    yield ""
    yield _row("Coded block", [str(index) for index in range(1, len(blocks) + 1)])
    yield _row("Early decoding: accuracy", map(_percent, early.block_accuracy))
    balanced = (block.balanced_accuracy for block in early.blocks)
    yield _row("Early decoding: mean over the classes", map(_percent, balanced))
    yield _row("Early decoding: agrees with output", map(_percent, early.block_agreement))
    yield _row("Energy outside the path of the class", map(_percent, paths.outside))
    for kind in KINDS:
        curves: list[RemovalCurve] = [getattr(block, kind) for block in blocks]
        changes = [_points(curve.accuracy[-1], removal.accuracy) for curve in curves]
        yield _row(f"All {kind} branches removed, points", changes)
    drawn = ", a seeded draw" if removal.samples < evaluation.test_samples else ""
    yield f"Branches were removed for {removal.samples} images{drawn}."
    yield from _semantic_lines(evaluation)
    if evaluation.one_class:
        yield ""
        yield from _class_table(evaluation.one_class)
        yield from _notes(evaluation)
    if evaluation.not_computed:
        yield ""
        for name, reason in evaluation.not_computed.items():
            yield f"Not computed, or not all: {name}: {reason}"


def _semantic_lines(evaluation: Evaluation) -> Iterator[str]:
    semantics = evaluation.semantics
    if semantics is None:
        return
    for label, name in (
        ("Class distances: with the codewords", "codeword_correlation"),
        ("  beyond them, with the confusion", "confusion_correlation"),
        ("  of that, p of random labels", "confusion_p"),
    ):
        yield _row(label, [_fraction(getattr(block, name)) for block in semantics.blocks])
    yield f"Distances are those of {semantics.classes} classes."


def _class_table(result: OneClass) -> Iterator[str]:
    shown: Sequence[OneClassClassifier] = [one for one in result.classifiers if one.computed]
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
            f"  {printable(one.class_name)}"[:_LABEL],
            [str(one.positives), *map(_fraction, numbers)],
            width,
        )
    known = [one for one in result.classifiers if one.average_precision is not None]
    yield _row(
        "Mean average precision",
        ["", _fraction(result.mean_average_precision)],
        width,
    ) + (f"  ({len(known)} of {len(result.classifiers)} classes)")


def _notes(evaluation: Evaluation) -> Iterator[str]:
    result = evaluation.one_class
    assert result is not None
    if evaluation.one_class_samples:
        yield f"Tested on {evaluation.one_class_samples} of {evaluation.test_samples} images."
    if evaluation.thresholds_from == "training data":
        yield f"Thresholds: best F1 on {evaluation.threshold_samples} training images."
    else:
        yield "Thresholds: best F1 on the test data itself, as no training data is at hand;"
        yield "precision, recall and F1 are optimistic."
    if result.negatives_per_positive is not None:
        yield (
            f"Negatives: {result.negatives_per_positive} images of other classes for each of the "
            "class, drawn at random."
        )
    outside = [
        one.outside for one in result.classifiers if one.outside and one.outside.f1 is not None
    ]
    if outside:
        accepted, precision, f1 = (
            sum(getattr(one, name) for one in outside) / len(outside)
            for name in ("accepted", "precision", "f1")
        )
        yield (
            f"Of {evaluation.outside_samples} images of no class a classifier accepts "
            f"{_percent(accepted)} on average; against them its precision is {precision:.3f} and "
            f"its F1 {f1:.3f}."
        )


def _row(label: str, cells: Iterable[str], width: int = 9) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float, whole: float) -> str:
    return f"{100 * (share - whole):+.2f}"


def _fraction(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
