"""The results of an evaluation: JSON, CSV and figures in a folder, and text for a person.

What was measured also lies beside a model file: thresholds, margins of early exit, results. A
folder may hold several model files, of which only one was measured. `Companions` tells by the
SHA-256 of its weights, and leaves out, with a line on stderr, what is of any other.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.early_exit import EXIT_FILE, EarlyExit
from coded_resnext.files import (
    LARGEST_RESULTS,
    UNFIT,
    make_folder,
    printable,
    read_json,
    say,
    table_cell,
    write_atomically,
)
from coded_resnext.kernels.checks import checked_number
from coded_resnext.models.checkpoint import MODEL_FILE, find_model, weights_sha256
from coded_resnext.models.resnext import CodedResNeXt
from coded_resnext.training.run_folder import SUMMARY_FILE

from .evaluation import Evaluation, Images, Provenance
from .figures import save_figures
from .observe import Loader
from .one_class import OneClass, OneClassClassifier
from .removal import KINDS, RemovalCurve

EVALUATION_FILE = "evaluation.json"
PICTURES_FILE = "pictures.json"
FIGURES_FOLDER = "figures"
PICTURES_VERSION = 1
# Larger images are made smaller, in pixels; up to the other size they are kept without loss.
LARGEST, LOSSLESS = 96, 48


# What evaluation, figures, pictures and report need: module and package.
NEEDED = {
    "PIL": "Pillow",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}
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
# Of a run's summary: what was measured, and not where or how long.
RESULTS = (
    "test_accuracy",
    "test_balanced_accuracy",
    "early_decoding",
    "single_class_average_precision",
    "removal_accuracy",
    "remove_active_accuracy",
    "remove_inactive_accuracy",
)


def require_packages(work: str) -> None:
    """Refuses to begin work whose results could not be written at its end.

    Args:
        work: what needs the packages, for the message.

    Raises:
        ImportError: names those that are missing, and the extra that has them.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"{work} needs {' and '.join(missing)}; install coded-resnext[report]")


def to_json(evaluation: Evaluation) -> str:
    """Returns the text of `evaluation.json`."""
    return json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)


def save_evaluation(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    csv: bool = False,
    codebooks: Sequence[Codebook] | None = None,
) -> list[Path]:
    """Writes `evaluation.json`, and what else is asked for.

    Args:
        evaluation: the results.
        folder: made if missing.
        csv: write the tables too, as `NAME.csv`.
        codebooks: draw the figures too, into its folder `figures`; `model.codebooks`.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {EVALUATION_FILE: to_json(evaluation) + "\n"}
    if csv:
        files |= csv_tables(evaluation)
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    written = [folder / name for name in files]
    if codebooks is not None:
        written += save_figures(evaluation, codebooks, make_folder(folder, FIGURES_FOLDER))
    return written


def load_evaluation(path: str | Path) -> Evaluation:
    """Reads the results that `save_evaluation` wrote.

    Args:
        path: the file, or the folder that has it.

    Raises:
        ValueError: the file is damaged, or of another format version; the message names it.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EVALUATION_FILE
    try:
        return Evaluation.from_dict(read_json(path, LARGEST_RESULTS))
    except UNFIT as error:
        raise ValueError(f"{path}: not an evaluation: {error}") from error


def save_pictures(
    positions: Sequence[int],
    loader: Loader,
    preprocessing: Preprocessing,
    folder: str | Path,
    images: Images | None = None,
) -> Path:
    """Writes pictures of some images of a loader as JSON.

    Args:
        positions: of images in the loader, counted from 0.
        loader: batches of images `[B, C, H, W]` and class indices, in the same order always.
        preprocessing: what made the images; undone, so that they can be looked at.
        folder: the folder that gets the file.
        images: what the loader gives, as the evaluation's `provenance.test` says.

    Returns:
        The file.

    Raises:
        ValueError: the loader has fewer images, or other channels than the preprocessing.
        ImportError: Pillow is not installed.
    """
    wanted, pictures = set(positions), dict[int, str]()
    start = 0
    for batch, _ in loader:
        if len(pictures) == len(wanted):
            break
        here = sorted(wanted.intersection(range(start, start + len(batch))))
        if here:
            rows = torch.tensor([position - start for position in here])
            pictures.update(zip(here, pictures_of(batch[rows], preprocessing), strict=True))
        start += len(batch)
    if missing := wanted - pictures.keys():
        raise ValueError(f"positions: expected numbers below {start}, got {max(missing)}")
    content: dict[str, Any] = {
        "format_version": PICTURES_VERSION,
        "images_sha256": None if images is None else images.sha256,
        "pictures": {str(position): pictures[position] for position in sorted(pictures)},
    }
    path = Path(folder) / PICTURES_FILE
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def load_pictures(path: str | Path, images: Images | None = None) -> dict[int, str]:
    """Reads pictures by their position in the loader, as `data:` addresses.

    Args:
        path: the file.
        images: those that the pictures must be of; None takes any.

    Raises:
        ValueError: the file is damaged, of another format version, or of other images.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        if content["format_version"] != PICTURES_VERSION:
            raise ValueError(
                f"format_version: expected {PICTURES_VERSION}, got {content['format_version']!r}"
            )
        pictures = {int(position): picture for position, picture in content["pictures"].items()}
        if images is not None and content.get("images_sha256") not in (None, images.sha256):
            raise ValueError("it has pictures of other images than those that were measured")
    except UNFIT as error:
        raise ValueError(f"{path}: not a file of pictures: {error}") from error
    if not all(isinstance(p, str) and p.startswith("data:image/") for p in pictures.values()):
        raise ValueError(f"{path}: not a file of pictures: expected data:image/ addresses")
    return pictures


def pictures_of(images: Tensor, preprocessing: Preprocessing) -> list[str]:
    """Returns inputs `[B, C, H, W]` as `data:` addresses of pictures, preprocessing undone.

    Small ones are PNG without loss, larger ones JPEG of at most 96 pixels.

    Raises:
        ValueError: the channels are not those of the preprocessing.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow; pip install pillow") from error
    if images.shape[1] != preprocessing.channels:
        raise ValueError(
            f"images: expected {preprocessing.channels} channels as the preprocessing has, "
            f"got {images.shape[1]}"
        )
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    addresses = []
    for picture in pixels.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        image.thumbnail((LARGEST, LARGEST))
        kind = "png" if max(image.size) <= LOSSLESS else "jpeg"
        buffer = io.BytesIO()
        # Of no effect on PNG.
        image.save(buffer, kind, optimize=True, quality=80)
        text = base64.b64encode(buffer.getvalue()).decode("ascii")
        addresses.append(f"data:image/{kind};base64,{text}")
    return addresses


def text_tables(evaluation: Evaluation) -> str:
    """Returns the tables for a person to read."""
    return "\n".join(_lines(evaluation))


def csv_tables(evaluation: Evaluation) -> dict[str, str]:
    """Returns CSV files by name: `classes`; of a coded network `blocks`, `removal`, `disobedient`.

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


class Companions:
    """The files beside a model file that were measured on its weights.

    Args:
        checkpoint: the model file, the folder of a run that has one, or a name of shipped weights.
        model: the network that was read from it.

    Attributes:
        folder: where they lie.
        target: the folder for what is made of the model: the same, and for shipped weights one of
            their name in the current folder.
    """

    def __init__(self, checkpoint: str | Path, model: CodedResNeXt) -> None:
        path = find_model(checkpoint)
        self.folder = path if path.is_dir() else path.parent
        self.target = self.folder if path == Path(checkpoint) else Path(checkpoint)
        self._is_model = path.is_dir() or path.name == MODEL_FILE
        self._sha256 = weights_sha256(model)

    def thresholds(self) -> dict[str, float]:
        """Returns the thresholds that the evaluation chose, of the classes that have one.

        Raises:
            ValueError: the file of the evaluation is damaged.
        """
        path = self.folder / EVALUATION_FILE
        content = self._read(path, "evaluation")
        try:
            rows = (content.get("one_class") or {}).get("classifiers", [])
            return {
                row["class_name"]: checked_number("threshold", row["threshold"])
                for row in rows
                if row["threshold"] is not None
            }
        except UNFIT as error:
            raise ValueError(f"{path}: not a readable evaluation: {error}") from error

    def early_exit(self) -> EarlyExit | None:
        """Returns the criterion of early exit, None where there is none; raises as its `load`."""
        path = self.folder / EXIT_FILE
        if not path.is_file():
            return None
        criterion = EarlyExit.load(path)
        return criterion if self._belongs(path, criterion.weights_sha256) else None

    def results(self) -> dict[str, Any]:
        """Returns what the run's summary says was measured; a ValueError where it is damaged."""
        content = self._read(self.folder / SUMMARY_FILE, "summary")
        return {key: content[key] for key in RESULTS if key in content}

    def _read(self, path: Path, kind: str) -> dict[str, Any]:
        """Returns the content of a JSON file, nothing where there is none or it is of others."""
        if not path.is_file():
            return {}
        try:
            content = read_json(path, LARGEST_RESULTS)
            if not isinstance(content, dict):
                raise ValueError(f"expected an object, got {type(content).__name__}")
        except ValueError as error:
            raise ValueError(f"{path}: not a readable {kind}: {error}") from error
        return content if self._belongs(path, content.get("weights_sha256")) else {}

    def _belongs(self, path: Path, sha256: object) -> bool:
        """Says whether a file is for these weights; one that does not say so is for the model's."""
        belongs = self._is_model if sha256 is None else sha256 == self._sha256
        if not belongs:
            say(f"{path}: measured on other weights, left out", file=sys.stderr)
        return belongs
