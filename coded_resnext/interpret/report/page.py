"""The report of a run: its content, gathered from the files of the run, as one HTML file.

Style, script and data are in the file: nothing is loaded from afar. Long lists of numbers are
base64, so that a page with a thousand classes stays small. What is missing is listed.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coded_resnext import __version__
from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import EXIT_FILE, EarlyExit
from coded_resnext.deploy.extract import extract_classifier
from coded_resnext.files import UNFIT, brief, parse_csv, read_json, read_text
from coded_resnext.interpret.decoding import Samples
from coded_resnext.interpret.evaluation import Evaluation, Images, from_plain
from coded_resnext.interpret.results import (
    EVALUATION_FILE,
    PICTURES_FILE,
    load_evaluation,
    load_pictures,
)
from coded_resnext.models.checkpoint import MODEL_FILE, LoadedModel, load_model, weights_sha256
from coded_resnext.training.run_folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from coded_resnext.training.ways import WAYS_FILE, read_choice

FORMAT_VERSION = 1
EXIT_MEASUREMENT_FILE = "early_exit_test.json"
# The experiments on the page, with the words for them.
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
SCRIPTS = (
    "base",
    "chart",
    "chooser",
    "network",
    "samples",
    "curves",
    "classifiers",
    "exits",
    "codebooks",
    "training",
    "main",
)
MANY_CLASSES = 100
# What the template writes itself; the rest goes into the page as data.
_STATIC = (
    *("missing", "config", "command", "versions", "seconds", "ways", "title", "summary", "cost"),
)
_SECTIONS = (
    ("overview", "Overview", None),
    ("paths", "Paths", "coded"),
    ("early-decoding", "Early decoding", "early_decoding"),
    ("removal", "Removing branches", "removal"),
    ("classifiers", "Classifiers", "one_class"),
    ("early-exit", "Early exit", "early_exit"),
    ("codebooks", "Codebooks", "coded"),
    ("training", "Training", "training"),
    ("configuration", "Configuration", None),
)
# Shorter lists stay readable; longer lists of floats are rounded to single precision.
SHORTEST, MOST_DOUBLES = 16, 4096
_INTEGERS = (("u8", "<u1"), ("u16", "<u2"), ("i32", "<i4"))


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
    """Returns the content of a report, JSON-ready: the saved results of a run, None for what is
    missing.

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
    """Lists a summary that was measured on other images than the results."""
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
    """Lists the experiments that lack something, with the reasons that the evaluation gives."""
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
    """Describes classes, blocks, codebooks and cost, by the model or else the evaluation."""
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
    coded = {block.block: books[block.codebook] for block in evaluation.blocks}
    return {
        "class_names": list(evaluation.class_names),
        "blocks": [
            {"branches": coded[index].branches, "active": coded[index].active}
            if index in coded
            else {"branches": None, "active": None}
            for index in range(max(coded, default=-1) + 1)
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


def render(content: dict[str, Any]) -> str:
    """Returns the page of the content that `gather` returned.

    Nothing in a name or a setting is taken for markup: the template escapes, and the data is JSON
    without any `<`. The page's own policy forbids every request and every other script.

    Args:
        content: of a run, as `gather` returns it.

    Raises:
        ImportError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError("the report needs Jinja; install coded-resnext[report]") from error
    assets = files(__package__) / "assets"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    style = asset("page.css")
    parts = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    # Of many classes there are many short lists, and single precision keeps the file small.
    precision = {"most_doubles": 0} if len(content["class_names"] or ()) > MANY_CLASSES else {}
    data = pack({k: v for k, v in content.items() if k not in _STATIC}, **precision)
    shown = parts_shown(content)
    evaluation = content["evaluation"] or {}
    return environment.from_string(asset("page.html")).render(
        content=content,
        data=data,
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - files of this package
        style_hash=_hash(style),
        script_hash=_hash(script),
        subtitle=_subtitle(content),
        tiles=tiles(content),
        shown=shown,
        sections=[(id_, text) for id_, text, key in _SECTIONS if key is None or shown[key]],
        removal_note=_removal_note(evaluation.get("removal")),
        thresholds_note=_thresholds_note(evaluation),
        version=__version__,
    )


def parts_shown(content: dict[str, Any]) -> dict[str, bool]:
    """Says for which parts of the page there is content."""
    evaluation = content["evaluation"] or {}
    return {
        "coded": bool(content["codebooks"]),
        "training": content["training_log"] is not None,
        **{key: evaluation.get(key) is not None for key in EXPERIMENTS},
    }


def tiles(content: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the headline numbers, as far as they are known."""
    headlines: list[dict[str, str]] = []

    def add(value: str, name: str, note: str = "") -> None:
        headlines.append({"value": value, "name": name, "note": note})

    evaluation, summary, cost = content["evaluation"], content["summary"], content["cost"]
    if summary is not None:
        images = f"{evaluation['test_samples']:,} images"
        balanced = f"mean over the classes {100 * summary['test_balanced_accuracy']:.2f} %"
        add(f"{100 * summary['test_accuracy']:.2f} %", "test accuracy", f"{images}; {balanced}")
        early = summary["early_decoding"]
        if early:
            note = f"block {len(early)}: {100 * early[-1]:.1f} %" if len(early) > 1 else ""
            add(f"{100 * early[0]:.1f} %", "decoded at the first coded block", note)
        if evaluation["one_class"] is not None:
            precisions = summary["single_class_average_precision"]
            known = [value for value in precisions if value is not None]
            mean = f"{math.fsum(known) / len(known):.3f}" if known else "n/a"
            note = f"one class against the rest, {len(known):,} of {len(precisions):,} classes"
            add(mean, "mean average precision", note)
    if cost is not None:
        whole, part = cost["network"], cost["classifier"]
        size = content["image_size"]
        image = f"an image of {size} by {size} pixels" if size else "one image"
        add(_count(whole["parameters"]), "parameters", _bytes(whole["bytes"]))
        add(_count(whole["macs"]), "multiply-accumulates", image)
        if part is not None:
            share = part["share_of_network"]
            add(
                f"{100 * share['parameters']:.0f} %",
                "of the parameters do for one class",
                f"and {100 * share['macs']:.0f} % of the multiply-accumulates",
            )
    return headlines


def _count(number: int) -> str:
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def _subtitle(content: dict[str, Any]) -> str:
    parts = []
    if content["class_names"] is not None:
        parts.append(f"{len(content['class_names']):,} classes")
        coded = len(content["block_codebooks"])
        parts.append(f"{coded} coded blocks" if coded else "a plain network, without codebooks")
    provenance = (content["evaluation"] or {}).get("provenance")
    if provenance is not None:
        test = provenance["test"]
        names = [word for word in (test["name"], test["split"]) if word]
        where = f"{' '.join(names)}, " if names else ""
        parts.append(f"measured on {where}{test['samples']:,} images")
    training = []
    data = (content["config"] or {}).get("data")
    if isinstance(data, str):
        training.append(f"on {data}")
    if content["seconds"] is not None:
        minutes = content["seconds"] / 60
        took = f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
        training.append(f"in {took}")
    if training:
        parts.append(f"trained {' '.join(training)}")
    return " · ".join(parts)


def _removal_note(removal: dict[str, Any] | None) -> str:
    repeats = (removal or {}).get("repeats", 1)
    if repeats == 1:
        return "Branches were drawn at random once."
    return f"Branches were drawn at random {repeats} times; the band is one deviation."


def _thresholds_note(evaluation: dict[str, Any]) -> str:
    if evaluation.get("thresholds_from") == "test data":
        return (
            "Thresholds are those of the best F1 on the test images themselves, as there were no "
            "others; precision, recall and F1 in the table are optimistic."
        )
    return "Thresholds are those of the best F1 on the training images."


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def pack(value: Any, most_doubles: int = MOST_DOUBLES) -> Any:
    """Packs long lists of numbers, and of equally long lists, in a JSON-ready value.

    Such a list becomes `{"packed": base64, "type": "u8", "u16", "i32", "f32" or "f64"}`, little-
    endian, a list of lists with their length as `"width"`. None among numbers becomes NaN. Whole
    numbers stay exact.

    Args:
        value: of dictionaries, lists, numbers, texts and None.
        most_doubles: longest list of floats that stays exact in any case; those of longer ones are
            rounded to single precision.
    """
    if isinstance(value, dict):
        return {key: pack(part, most_doubles) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    width = None
    numbers = value
    if value and all(isinstance(row, list) and len(row) == len(value[0]) for row in value):
        width = len(value[0])
        numbers = [entry for row in value for entry in row]
    if width == 0 or len(numbers) < SHORTEST or not all(map(_is_number, numbers)):
        return [pack(part, most_doubles) for part in value]
    kind, array = _array(numbers, most_doubles)
    packed = {"packed": base64.b64encode(array.tobytes()).decode("ascii"), "type": kind}
    return packed if width is None else {**packed, "width": width}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _array(numbers: list[Any], most_doubles: int) -> tuple[str, NDArray[Any]]:
    if all(isinstance(number, int) for number in numbers):
        low, high = min(numbers), max(numbers)
        for kind, dtype in _INTEGERS:
            limits = np.iinfo(dtype)
            if limits.min <= low and high <= limits.max:
                return kind, np.array(numbers, dtype)
    exact = np.array([np.nan if number is None else number for number in numbers], "<f8")
    with np.errstate(over="ignore"):
        single = exact.astype("<f4")
    if len(exact) > most_doubles or np.array_equal(single.astype("<f8"), exact, equal_nan=True):
        return "f32", single
    return "f64", exact
