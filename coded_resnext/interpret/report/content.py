"""Gathers the content of a report from the files of a run, and lists what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import EXIT_FILE, EarlyExit
from coded_resnext.deploy.extract import extract_classifier
from coded_resnext.files import UNFIT, brief, parse_csv, read_json, read_text
from coded_resnext.interpret.evaluate import Evaluation
from coded_resnext.interpret.provenance import Images
from coded_resnext.interpret.records import from_plain
from coded_resnext.interpret.results import (
    EVALUATION_FILE,
    PICTURES_FILE,
    load_evaluation,
    load_pictures,
)
from coded_resnext.interpret.samples import Samples
from coded_resnext.models.checkpoint import MODEL_FILE, LoadedModel, load_model, weights_sha256
from coded_resnext.training.run_folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from coded_resnext.training.ways import WAYS_FILE, read_choice

FORMAT_VERSION = 1
EXIT_MEASUREMENT_FILE = "early_exit_test.json"
# The experiments that have a place on the page, with the words for them.
EXPERIMENTS = {
    "paths": "Measured energies of the classes",
    "samples": "Single test images",
    "early_decoding": "Early decoding",
    "removal": "Removing branches",
    "one_class": "One-class classifiers",
    "early_exit": "Early exit",
}
_EVALUATE = "`coded-resnext eval RUN DATA --out RUN` makes it."
# What the page has from elsewhere.
_NOT_REPEATED = ("class_names", "codebooks", "blocks", "cost")
Read = TypeVar("Read")


@dataclass
class _Gathering:
    """Reading the files of a folder, and keeping a list of what is missing."""

    folder: Path
    missing: list[dict[str, str | None]] = field(default_factory=list)
    files: int = 0

    def lacks(self, part: str, why: str, remedy: str | None = None) -> None:
        self.missing.append({"part": part, "why": why, "remedy": remedy})

    def read(
        self, part: str, name: str, reader: Callable[[Path], Read], remedy: str | None = None
    ) -> Read | None:
        """Returns the content of a file; None, and a word about it, where it cannot be read."""
        path = self.folder / name
        if not path.is_file():
            self.lacks(part, f"{name} is not in the run's folder.", remedy)
            return None
        self.files += 1
        try:
            return reader(path)
        except (*UNFIT, OSError) as error:
            # Messages name the file by its path, which is nobody's business on a page to send.
            said = str(error).replace(f"{self.folder}/", "")
            self.lacks(part, f"{name} cannot be read: {said or type(error).__name__}.", remedy)
            return None

    def read_if_there(self, part: str, name: str, reader: Callable[[Path], Read]) -> Read | None:
        """Returns the content of a file that a run need not have; None where it is not there."""
        return self.read(part, name, reader) if (self.folder / name).is_file() else None


def gather(folder: str | Path) -> dict[str, Any]:
    """The content of a report, JSON-ready: the saved results of a run, None for what is missing.

    Args:
        folder: of a run, finished or not, or of an evaluation.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: the folder holds nothing of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"RUN: expected the folder of a run, found none at {folder}")
    gathering = _Gathering(folder)
    loaded = gathering.read("The network", MODEL_FILE, load_model)
    config = gathering.read("Configuration", CONFIG_FILE, _read_object)
    summary = gathering.read("Summary", SUMMARY_FILE, _read_summary) or {}
    log = gathering.read("Training curves", METRICS_FILE, read_log)
    choice = gathering.read_if_there("Ways to compute a step", WAYS_FILE, read_choice)
    evaluation = gathering.read("Results", EVALUATION_FILE, load_evaluation, _EVALUATE)
    if not gathering.files:
        raise ValueError(
            f"RUN: expected the folder of a run, got {folder}, which has no file of one"
        )
    evaluation = _fitting(gathering, evaluation, loaded)
    _note_other_images(gathering, evaluation, summary)
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "title": folder.resolve().name,
        "config": config,
        "command": summary.get("command"),
        "versions": summary.get("versions"),
        "seconds": summary.get("seconds"),
        "ways": None if choice is None else choice.described(),
        "training_log": log,
        **_network(loaded, evaluation),
        "evaluation": None,
        "summary": None,
        "pictures": None,
    }
    if evaluation is not None:
        _note_missing_experiments(gathering, evaluation)
        described = evaluation.to_dict()
        content["evaluation"] = {k: v for k, v in described.items() if k not in _NOT_REPEATED}
        content["summary"] = evaluation.summary()
    samples = evaluation.samples if evaluation is not None else None
    if evaluation is not None and samples is not None:
        content["pictures"] = _pictures(gathering, samples, evaluation.images)
    content |= _early_exit(gathering, samples, loaded)
    return {**content, "missing": gathering.missing}


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def _read_summary(path: Path) -> dict[str, Any]:
    """Returns the summary of a run; a ValueError where what the page shows of it does not fit."""
    content = _read_object(path)
    for name, kind in (("command", str), ("versions", dict), ("seconds", int | float)):
        value = content.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{name}: expected another kind of value, got {brief(value)}")
    return content


def read_log(path: Path) -> dict[str, list[float | None]]:
    """Returns the columns of a training log; None where it says NaN.

    Raises:
        ValueError: it has no row, or something but numbers in one.
    """
    titles, *rows = parse_csv(read_text(path)) or [[]]
    # The last line of a log that is being written may be cut short.
    rows = [row for row in rows if len(row) == len(titles)]
    if not rows or not titles:
        raise ValueError("no epoch is finished")
    columns: dict[str, list[float | None]] = {name: [] for name in titles}
    for row in rows:
        for name, text in zip(titles, row, strict=True):
            value = float(text) if text else math.nan
            columns[name].append(value if math.isfinite(value) else None)
    return columns


def _fitting(
    gathering: _Gathering, evaluation: Evaluation | None, loaded: LoadedModel | None
) -> Evaluation | None:
    """Returns the evaluation, unless it is of another network or of other weights."""
    if evaluation is None or loaded is None:
        return evaluation
    if evaluation.weights_sha256 not in (None, weights_sha256(loaded.model)):
        gathering.lacks(
            "Results", f"{EVALUATION_FILE} is of other weights than {MODEL_FILE}.", _EVALUATE
        )
        return None
    words = [Codebook.from_dict(book).words for book in evaluation.codebooks]
    evaluated = [words[block.codebook] for block in evaluation.blocks]
    ours = [book.words for book in loaded.model.codebooks]
    if evaluation.class_names == loaded.model.class_names and evaluated == ours:
        return evaluation
    gathering.lacks(
        "Results", f"{EVALUATION_FILE} is of other classes or codebooks than the model.", _EVALUATE
    )
    return None


def _note_other_images(
    gathering: _Gathering, evaluation: Evaluation | None, summary: dict[str, Any]
) -> None:
    """List a summary that was measured on other images than the results."""
    results = None if evaluation is None else evaluation.images
    if results is None or not summary.get("measured_on"):
        return
    try:
        images = from_plain(Images, summary["measured_on"], "measured_on")
    except ValueError as error:
        gathering.lacks("Summary", f"{SUMMARY_FILE} cannot be read: {error}.")
        return
    if images.sha256 != results.sha256:
        gathering.lacks(
            "Summary",
            f"{SUMMARY_FILE} was measured on other images ({images}) than {EVALUATION_FILE} "
            f"({results}); the page shows the latter.",
        )


def _note_missing_experiments(gathering: _Gathering, evaluation: Evaluation) -> None:
    """List the experiments that lack something, with the reasons that the evaluation gives."""
    if not evaluation.is_coded:
        return
    reasons = dict(evaluation.not_computed)
    for key, words in EXPERIMENTS.items():
        reason = reasons.pop(key, None)
        if reason is not None:
            gathering.lacks(words, f"not computed, or not all: {reason}.")
        elif getattr(evaluation, key) is None:
            gathering.lacks(words, f"{EVALUATION_FILE} has no result of it.", _EVALUATE)
    for name, reason in reasons.items():
        gathering.lacks(name.replace("_", " ").capitalize(), f"not computed, or not all: {reason}.")


def _network(loaded: LoadedModel | None, evaluation: Evaluation | None) -> dict[str, Any]:
    """Classes, blocks, codebooks and cost: of the model, or as far as the evaluation has them."""
    if loaded is not None:
        model = loaded.model
        books = list(model.stage_codebooks)
        size = loaded.preprocessing.size if loaded.preprocessing else None
        return {
            "class_names": list(model.class_names),
            "blocks": [
                {
                    "branches": block.branches,
                    "active": block.codebook.active if block.codebook is not None else None,
                }
                for block in model.blocks
            ],
            **_described(books, [books.index(book) for book in model.codebooks]),
            "image_size": size,
            "cost": None if size is None else _cost(loaded, size),
        }
    if evaluation is None:
        empty = _described([], [])
        return {"class_names": None, "blocks": [], **empty, "image_size": None, "cost": None}
    books = [Codebook.from_dict(book) for book in evaluation.codebooks]
    coded = {place.block: books[place.codebook] for place in evaluation.blocks}
    return {
        "class_names": list(evaluation.class_names),
        "blocks": [
            {"branches": coded[place].branches, "active": coded[place].active}
            if place in coded
            else {"branches": None, "active": None}
            for place in range(max(coded, default=-1) + 1)
        ],
        **_described(books, [block.codebook for block in evaluation.blocks]),
        "image_size": None,
        "cost": {"network": evaluation.cost, "classifier": None},
    }


def _described(books: Sequence[Codebook], of_blocks: list[int]) -> dict[str, Any]:
    return {
        "codebooks": [
            {
                "branches": book.branches,
                "active": book.active,
                "words": list(book.words),
                "min_distance": book.min_distance,
                "distances": {str(distance): pairs for distance, pairs in book.distances.items()},
                "column_loads": list(book.column_loads),
            }
            for book in books
        ],
        "block_codebooks": of_blocks,
    }


def _cost(loaded: LoadedModel, size: int) -> dict[str, Any]:
    """Returns the cost of the network and, beside it, of the classifier of its first class."""
    model = loaded.model
    whole = network_cost(model, size)
    classifier = None
    if model.coded_blocks and model.config["aggregation"] == "sum":
        part = network_cost(extract_classifier(model, 0), size)
        classifier = {**part.to_dict(), "share_of_network": part.relative_to(whole).to_dict()}
    return {"network": whole.to_dict(), "classifier": classifier}


def _pictures(gathering: _Gathering, samples: Samples, images: Images | None) -> list[str] | None:
    """Returns a picture for every sample."""

    def read(path: Path) -> list[str]:
        pictures = load_pictures(path, images)
        if not pictures.keys() >= set(samples.positions):
            raise ValueError(f"its images are not those of {EVALUATION_FILE}")
        return [pictures[position] for position in samples.positions]

    return gathering.read("Pictures of the test images", PICTURES_FILE, read, _EVALUATE)


def _early_exit(
    gathering: _Gathering, samples: Samples | None, loaded: LoadedModel | None
) -> dict[str, Any]:
    """Returns the run's own margins, where they were chosen, and what they were measured to do."""
    part = "The margins of this run"

    def check(weights: object) -> None:
        if weights is not None and loaded and weights != weights_sha256(loaded.model):
            raise ValueError(f"it is for other weights than {MODEL_FILE}")

    def read_criterion(path: Path) -> EarlyExit:
        criterion = EarlyExit.load(path)
        check(criterion.weights_sha256)
        return criterion

    def read(path: Path) -> dict[str, Any]:
        content = _read_object(path)
        check(content.get("weights_sha256"))
        return {key: float(content[key]) for key in ("early_accuracy", "macs_saved")}

    criterion = gathering.read_if_there(part, EXIT_FILE, read_criterion)
    exits = None
    if criterion is not None and samples is not None:
        if len(criterion.margins) == len(samples.blocks):
            exits = samples.scores.exits(criterion).tolist()
        else:
            gathering.lacks(part, f"{EXIT_FILE} is for another number of blocks.")
    return {
        "sample_exits": exits,
        "exit_measured": gathering.read_if_there(part, EXIT_MEASUREMENT_FILE, read),
    }
