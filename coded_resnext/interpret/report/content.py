"""What a report shows, gathered from the files of a run; what is not there is listed as missing."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...checkpoint import MODEL_FILE, LoadedModel, load_model
from ...cost import network_cost
from ...early_exit import EXIT_FILE, EarlyExit
from ...exit_calibration import ExitScores
from ...extract import extract_classifier
from ...models import CodedResNeXt
from ...run_folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from ..samples import SAMPLES_FILE

FORMAT_VERSION = 1
EVALUATION_FILE = "evaluation.json"
EXIT_MEASUREMENT_FILE = "early_exit_test.json"
# Parts of evaluation.json, with the words for them.
EVALUATED = {
    "paths": "Measured energies of the classes",
    "early_decoding": "Early decoding",
    "removal": "Removing branches",
    "one_class": "One-class classifiers",
    "exit_curve": "Early exit",
}
_EVALUATE = "`coded-resnext eval RUN DATA --out RUN` makes it."
Read = TypeVar("Read")


@dataclass
class _Gathering:
    """The parts found so far, and what is missing."""

    folder: Path
    parts: dict[str, Any] = field(default_factory=dict)
    missing: list[dict[str, str | None]] = field(default_factory=list)
    files: int = 0

    def lacks(self, part: str, why: str, remedy: str | None = None) -> None:
        self.missing.append({"part": part, "why": why, "remedy": remedy})

    def read(
        self, part: str, name: str, reader: Callable[[Path], Read], remedy: str | None = None
    ) -> Read | None:
        """What a file holds; None, and a word about it, where that cannot be had."""
        path = self.folder / name
        if not path.is_file():
            self.lacks(part, f"{name} is not in the run's folder.", remedy)
            return None
        self.files += 1
        try:
            return reader(path)
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            # Messages name the file by its path, which is nobody's business on a page to send.
            said = str(error).replace(f"{self.folder}/", "")
            self.lacks(part, f"{name} cannot be read ({said or type(error).__name__}).", remedy)
            return None


def gather(folder: str | Path) -> dict[str, Any]:
    """The content of a report, JSON-ready: the saved results of a run by part, None where missing.

    Args:
        folder: of a run, finished or not.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: the folder holds nothing of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"RUN: expected the folder of a run, found none at {folder}")
    found = _Gathering(folder)
    loaded = found.read("The network and its codebooks", MODEL_FILE, load_model)
    config = found.read("Configuration", CONFIG_FILE, _read_object)
    summary = found.read("Summary of the run", SUMMARY_FILE, _read_object)
    log = found.read("Training curves", METRICS_FILE, read_log)
    evaluation = found.read("Results of the evaluation", EVALUATION_FILE, _read_object, _EVALUATE)
    if not found.files:
        raise ValueError(f"RUN: expected the folder of a run, got {folder}, which has no file of one")
    found.parts = {
        "format_version": FORMAT_VERSION,
        "title": folder.resolve().name,
        "config": config,
        "command": (summary or {}).get("command"),
        "versions": (summary or {}).get("versions"),
        "seconds": (summary or {}).get("seconds"),
        "training_log": log,
        **_network(loaded),
    }
    is_plain = loaded is not None and not loaded.model.coded_blocks
    _add_evaluation(found, evaluation, is_plain)
    if not is_plain:
        _add_samples(found, loaded)
        _add_exit(found)
    return {**found.parts, "missing": found.missing}


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def read_log(path: Path) -> dict[str, list[float | None]]:
    """The columns of a training log.

    Raises:
        ValueError: it has no row, or something but numbers in one.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The last line of a log that is being written may be cut short.
    rows = [row for row in rows if None not in row.values() and None not in row]
    if not rows:
        raise ValueError("no epoch is finished")
    columns: dict[str, list[float | None]] = {name: [] for name in rows[0]}
    for row in rows:
        for name, text in row.items():
            value = float(text) if text else math.nan
            columns[name].append(value if math.isfinite(value) else None)
    return columns


def _network(loaded: LoadedModel | None) -> dict[str, Any]:
    """Blocks, codebooks and cost."""
    if loaded is None:
        return {"class_names": None, "network": None, "codebooks": [], "block_codebooks": []}
    model = loaded.model
    blocks = [
        {
            "coded": block.is_coded,
            "branches": block.branches,
            "active": block.codebook.active if block.codebook is not None else block.branches,
            "width": block.width,
            "stride": block.stride,
        }
        for block in model.blocks
    ]
    books = list(model.stage_codebooks)
    size = loaded.preprocessing.size if loaded.preprocessing else None
    return {
        "class_names": list(model.class_names),
        "network": {"blocks": blocks, "image_size": size, "cost": _cost(model, size)},
        "codebooks": [
            {
                "branches": book.branches,
                "active": book.active,
                "words": list(book.words),
                "min_distance": book.min_distance,
                "distances": {str(key): value for key, value in book.distances.items()},
                "column_loads": list(book.column_loads),
            }
            for book in books
        ],
        "block_codebooks": [books.index(book) for book in model.codebooks],
    }


def _cost(model: CodedResNeXt, size: int | None) -> dict[str, Any] | None:
    if size is None:
        return None
    whole = network_cost(model, size)
    content: dict[str, Any] = {"network": whole.to_dict(), "classifier": None}
    if model.coded_blocks and model.config["aggregation"] == "sum":
        part = network_cost(extract_classifier(model, 0), size)
        content["classifier"] = {
            **part.to_dict(),
            "share_of_network": part.relative_to(whole).to_dict(),
        }
    return content


def _add_evaluation(
    found: _Gathering, evaluation: dict[str, Any] | None, is_plain: bool
) -> None:
    """The parts of evaluation.json, unless it is about another network."""
    parts = found.parts
    parts.update(dict.fromkeys(("test_accuracy", "test_samples", "thresholds_from", *EVALUATED)))
    if evaluation is None:
        return
    names = evaluation.get("class_names")
    if parts["class_names"] is None:
        parts["class_names"] = names
    elif names != parts["class_names"]:
        found.lacks(
            "Results of the evaluation",
            f"the classes of {EVALUATION_FILE} are not those of the model.",
            _EVALUATE,
        )
        return
    for key in ("test_accuracy", "test_samples", "thresholds_from"):
        parts[key] = evaluation.get(key)
    for key, words in EVALUATED.items():
        content = evaluation.get(key)
        if content is not None:
            parts[key] = content
        elif not is_plain:
            found.lacks(words, f"{EVALUATION_FILE} has no result of it.", _EVALUATE)


def _add_samples(found: _Gathering, loaded: LoadedModel | None) -> None:
    """The traced test images, if they are of this network."""

    def read(path: Path) -> dict[str, Any]:
        samples = _read_object(path)
        blocks = samples["blocks"]
        if loaded is not None and (
            len(blocks) != len(loaded.model.coded_blocks)
            or max(samples["targets"]) >= loaded.model.num_classes
        ):
            raise ValueError("its images went through another network")
        return samples

    found.parts["samples"] = found.read("Test images", SAMPLES_FILE, read, _EVALUATE)


def _add_exit(found: _Gathering) -> None:
    """The run's own margins of early exit, where they were chosen: an extra that is not missed."""
    parts = found.parts
    parts["exit_criterion"] = parts["exit_measured"] = parts["sample_exits"] = None
    if (found.folder / EXIT_FILE).is_file():
        criterion = found.read("The run's early exit", EXIT_FILE, EarlyExit.load)
        if criterion is not None:
            parts["exit_criterion"] = criterion.to_dict()
            if parts["samples"] is not None:
                parts["sample_exits"] = _scores(parts["samples"]).exits(criterion).tolist()
    if (found.folder / EXIT_MEASUREMENT_FILE).is_file():
        parts["exit_measured"] = found.read(
            "The run's early exit", EXIT_MEASUREMENT_FILE, _read_object
        )


def _scores(samples: dict[str, Any]) -> ExitScores:
    blocks = samples["blocks"]
    return ExitScores(
        decoded=torch.tensor([block["decoded"] for block in blocks]).T,
        margins=torch.tensor([block["margins"] for block in blocks]).T,
        final=torch.tensor(samples["predictions"]),
        targets=torch.tensor(samples["targets"]),
    )
