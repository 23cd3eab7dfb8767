"""The numbers of a report as CSV files, one table each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import write_atomically

Rows = Iterator[Sequence[Any]]
CLASSIFIER_COLUMNS = (
    "positives",
    "negatives",
    "average_precision",
    "threshold",
    "precision",
    "recall",
    "f1",
)


def write_tables(content: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write every table that there is content for; shares are 0 to 1, blocks count from 1.

    Args:
        content: of a run, as `gather` returns it.
        folder: where the files go; made if missing.

    Returns:
        The paths of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (heading, rows) in _tables(content).items():
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(heading)
        writer.writerows(rows)
        path = folder / f"{name}.csv"
        write_atomically(path, buffer.getvalue().encode())
        written.append(path)
    return written


def _tables(content: dict[str, Any]) -> dict[str, tuple[Sequence[str], Rows]]:
    tables: dict[str, tuple[Sequence[str], Rows]] = {}
    if content["early_decoding"] is not None:
        early = content["early_decoding"]
        columns = (early["block_accuracy"], early["block_agreement"])
        tables["early_decoding"] = (
            ("block", "accuracy", "agreement"),
            ((number, *row) for number, row in enumerate(zip(*columns, strict=True), 1)),
        )
    if content["removal"] is not None:
        heading = ("block", "kind", "removed", "accuracy", "deviation")
        tables["removal"] = (heading, _removal_rows(content["removal"]))
    if content["one_class"] is not None:
        tables["classifiers"] = (
            ("class", *CLASSIFIER_COLUMNS),
            (
                (one["class_name"], *(one[column] for column in CLASSIFIER_COLUMNS))
                for one in content["one_class"]["classifiers"]
                if one is not None
            ),
        )
    if content["paths"] is not None and content["codebooks"]:
        tables["energies"] = (("block", "class", "branch", "active", "energy"), _energies(content))
    if content["exit_curve"] is not None:
        curve = content["exit_curve"]
        tables["early_exit"] = (
            ("margin", "accuracy", "macs"),
            zip(curve["margins"], curve["accuracy"], curve["macs"], strict=True),
        )
    if content.get("samples") is not None:
        heading = ("position", "class", "prediction", "block", "decoded", "margin")
        tables["samples"] = (heading, _samples(content))
    return tables


def _removal_rows(removal: dict[str, Any]) -> Rows:
    for number, block in enumerate(removal["blocks"], 1):
        for kind, curve in (block or {}).items():
            columns = (curve["removed"], curve["accuracy"], curve["deviation"])
            for row in zip(*columns, strict=True):
                yield number, kind, *row


def _energies(content: dict[str, Any]) -> Rows:
    for index, rows in enumerate(content["paths"]["energies"]):
        words = content["codebooks"][content["block_codebooks"][index]]["words"]
        for name, word, row in zip(content["class_names"], words, rows, strict=True):
            for branch, energy in enumerate(row or ()):
                yield index + 1, name, branch, word[branch], energy


def _samples(content: dict[str, Any]) -> Rows:
    samples, names = content["samples"], content["class_names"]
    for number, block in enumerate(samples["blocks"], 1):
        columns = ("positions", "targets", "predictions")
        said = (*(samples[key] for key in columns), block["decoded"], block["margins"])
        for position, target, prediction, decoded, margin in zip(*said, strict=True):
            yield position, names[target], names[prediction], number, names[decoded], margin
