"""Networks to share: a folder of safetensors, JSON and a model card, on disk or on the Hub.

`model.safetensors` is what `checkpoint.save_model` writes; `config.json` says the same without the
weights, and has the thresholds, the criterion of early exit, results, and the weights' SHA-256.
Nothing in either is executed on loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import UNFIT, file_sha256, printable, read_json, write_atomically
from coded_resnext.kernels.checks import check_annotated, checked_number, typed
from coded_resnext.models.checkpoint import MODEL_FILE, find_model, load_model, save_model
from coded_resnext.models.resnext import CodedResNeXt, own_network

from .early_exit import EarlyExit

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE)


@dataclass(frozen=True)
class Pretrained:
    """A network with all that is needed to use it, and what is known about it."""

    model: CodedResNeXt
    """The network, in evaluation mode when it was loaded."""
    preprocessing: Preprocessing | None = None
    """Preprocessing that turns images into the network's input."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of one-class classifiers, by class; where one was chosen."""
    early_exit: EarlyExit | None = None
    """Criterion by which an image may leave early."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """How the network was trained, JSON-ready."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, JSON-ready."""
    name: str = "Coded ResNeXt"
    """Title of the card."""
    license: str | None = None
    """Identifier of the weights' licence, such as `mit`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", own_network(self.model))
        check_annotated(type(self), vars(self))
        unknown = sorted(set(self.thresholds) - set(self.model.class_names))
        if unknown:
            raise ValueError(f"thresholds: expected classes of the model, got {unknown[0]!r}")
        numbers = {k: checked_number(f"thresholds: {k}", v) for k, v in self.thresholds.items()}
        object.__setattr__(self, "thresholds", numbers)
        blocks = len(self.model.coded_blocks)
        if self.early_exit is not None and len(self.early_exit.margins) != blocks:
            raise ValueError(
                f"early_exit: expected a margin for each of {blocks} coded blocks, "
                f"got {len(self.early_exit.margins)}"
            )

    def description(self) -> dict[str, Any]:
        """Returns the content of `config.json` without the checksum."""
        from importlib.metadata import version

        model = self.model
        return {
            "format_version": FORMAT_VERSION,
            "library": "coded-resnext",
            "library_version": version("coded-resnext"),
            "name": self.name,
            "license": self.license,
            "architecture": model.config,
            "class_names": list(model.class_names),
            "codebooks": [book.to_dict() for book in model.stage_codebooks],
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "thresholds": dict(self.thresholds),
            "early_exit": None if self.early_exit is None else self.early_exit.to_dict(),
            "training": dict(self.training),
            "results": dict(self.results),
        }


@typed
def save_pretrained(pretrained: Pretrained, folder: str | Path) -> Path:
    """Writes a network with its card and its description; the description comes last.

    Args:
        pretrained: the network.
        folder: made when it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: the notes are not JSON-ready, or the network has no classifier.
        OSError: the folder cannot be written.
    """
    description = pretrained.description()
    try:
        json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training, results: expected what JSON can hold: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(
        folder / MODEL_FILE,
        pretrained.model,
        preprocessing=pretrained.preprocessing,
        training=dict(pretrained.training),
    )
    write_atomically(folder / CARD_FILE, model_card(pretrained).encode())
    description["sha256"] = {MODEL_FILE: file_sha256(folder / MODEL_FILE)}
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())
    return folder


@typed
def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Pretrained:
    """Reads what `save_pretrained` wrote: shipped, in a folder, or on the Hugging Face Hub.

    Args:
        source: the name of shipped weights, such as `"digits"`; a folder; or, where there is none
            of that name, `OWNER/NAME` on the Hub.
        revision: branch, tag or commit on the Hub.
        token: as `huggingface_hub` has it.
        cache_dir: as `huggingface_hub` has it.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a damaged file, one of another format version, or weights whose checksum or
            architecture is not the one in the description.
        ImportError: huggingface_hub is missing; the message names the extra.
        OSError: the Hub cannot be reached, or has no such network.
    """
    folder = find_model(source)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(
                f"source: expected a folder of save_pretrained or OWNER/NAME, got the file "
                f"{source}; load_weights(model, file) reads weights alone"
            )
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
            raise FileNotFoundError(
                f"source: expected a folder or OWNER/NAME on the Hub; {source} is neither"
            )
        folder = _download(str(source), revision, token, cache_dir)
    path, weights = folder / CONFIG_FILE, folder / MODEL_FILE
    for needed in (path, weights):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: expected a file of save_pretrained, found none")
    try:
        description = read_json(path)
        version = description["format_version"]
        expected = description["sha256"][MODEL_FILE]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable description: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version: expected {FORMAT_VERSION}, got {version!r}")
    digest = file_sha256(weights)
    if digest != expected:
        raise ValueError(
            f"{weights}: expected SHA-256 {expected} as in {CONFIG_FILE}, got {digest}"
        )
    loaded = load_model(weights)
    try:
        early_exit = description["early_exit"]
        pretrained = Pretrained(
            loaded.model,
            loaded.preprocessing,
            description["thresholds"],
            None if early_exit is None else EarlyExit.from_dict(early_exit),
            description["training"],
            description["results"],
            description["name"],
            description["license"],
        )
        for key, value in _architecture(pretrained).items():
            if description[key] != value:
                raise ValueError(f"{key}: expected what {MODEL_FILE} has, got another")
    except UNFIT as error:
        raise ValueError(f"{path}: damaged or incomplete description: {error}") from error
    return pretrained


@typed
def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload a Coded ResNeXt",
) -> str:
    """Uploads a folder that `save_pretrained` wrote to the Hugging Face Hub, after reading it once.

    Args:
        folder: the folder; its three files are uploaded and nothing else.
        repository: `OWNER/NAME`; made when it does not exist.
        private: whether a new repository is private.
        revision: branch.
        token: as `huggingface_hub` has it.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: as `from_pretrained` of the folder.
        ImportError: huggingface_hub is missing; the message names the extra.
        OSError: the Hub cannot be reached, or refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of save_pretrained, found none")
    links = [name for name in FILES if (folder / name).is_symlink()]
    if links:
        raise ValueError(f"{folder / links[0]}: expected a file of its own, got a link to another")
    write_atomically(folder / CARD_FILE, model_card(from_pretrained(folder)).encode())
    hub = _hub()
    api = hub.HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        allow_patterns=list(FILES),
        revision=revision,
        commit_message=message,
    )
    return str(commit.commit_url)


def _architecture(pretrained: Pretrained) -> dict[str, Any]:
    """Returns the part of the description that the weights' header has too, as read of JSON."""
    description = pretrained.description()
    keys = ("architecture", "class_names", "codebooks", "preprocessing")
    part: dict[str, Any] = json.loads(json.dumps({key: description[key] for key in keys}))
    return part


def _download(
    repository: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    """Fetches weights and description into the Hub's cache, and returns their folder."""
    hub = _hub()
    paths = [
        hub.hf_hub_download(repository, name, revision=revision, token=token, cache_dir=cache_dir)
        for name in (MODEL_FILE, CONFIG_FILE)
    ]
    return Path(paths[0]).parent


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs huggingface_hub: pip install 'coded-resnext[hub]'"
        ) from error
    return huggingface_hub


SHOWN_CLASSES = 20


# What a table cell has room for; all of it is in config.json.
CELL = 120


def model_card(pretrained: Pretrained) -> str:
    """Returns Markdown with the front matter that the Hub reads."""
    model = pretrained.model
    front = {
        "library_name": "coded-resnext",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "coded-resnext", "interpretability"],
    }
    if pretrained.license is not None:
        front["license"] = pretrained.license
    # A JSON value is a YAML value.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    names = ", ".join(map(_cell, model.class_names[:SHOWN_CLASSES]))
    names += ", .." if model.num_classes > SHOWN_CLASSES else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines += [
        f"# {_cell(pretrained.name)}",
        "",
        _kind(pretrained),
        "",
        f"- {model.num_classes} classes: {names}",
        f"- {parameters:,} parameters",
        f"- input: {_input(pretrained)}",
        *(
            f"- stage {number}: {stage['depth']} blocks of {stage['channels']} channels, "
            f"{stage['branches']} branches of width {stage['width']}, " + _assignment(stage)
            for number, stage in enumerate(model.config["stages"], 1)
        ),
        f"- licence of the weights: {_cell(pretrained.license or 'not stated')}",
        "",
        "## Use",
        "",
        "```python",
        "from coded_resnext import from_pretrained",
        "",
        'pretrained = from_pretrained("FOLDER or OWNER/NAME")',
        "images = pretrained.preprocessing(picture)[None]  # a PIL image",
        "logits = pretrained.model(images)",
        "```",
        "",
        "## Training",
        "",
        *_table(pretrained.training, "How it was trained is not recorded."),
        "",
        "## Results",
        "",
        *_table(pretrained.results, "No results are recorded."),
        "",
        *_decisions(pretrained),
        "## What it should not be used for",
        "",
        f"- Images of anything but its {model.num_classes} classes: it always names one of them, "
        "and cannot say that an image shows none.",
        "- Images that are unlike its training images, or prepared in another way: no result "
        "above speaks for them.",
        "- Decisions about people, or where a mistake does harm, without a person who checks: "
        "nothing was measured on robustness, fairness or calibration unless it stands above.",
        "- As evidence of why an image got its class: branch energies show which branches were "
        "active, not what they saw.",
        "",
    ]
    return "\n".join(lines)


def _kind(pretrained: Pretrained) -> str:
    blocks = len(pretrained.model.coded_blocks)
    if not blocks:
        return (
            "An image classifier, a plain ResNeXt: the twin of a Coded ResNeXt, with no branch "
            "assigned to a class."
        )
    return (
        f"An image classifier, a Coded ResNeXt. In {blocks} coded blocks a codebook assigns "
        "branches to classes before training, so that the energies of the branches show the class, "
        "and a classifier of any single class can be cut out."
    )


def _assignment(stage: Mapping[str, Any]) -> str:
    if stage["active"] == stage["branches"]:
        return "plain"
    return f"{stage['active']} of them for each class"


def _input(pretrained: Pretrained) -> str:
    images = pretrained.preprocessing
    if images is None:
        return f"{pretrained.model.in_channels} channels; preprocessing not recorded"
    return (
        f"{images.size}x{images.size} pixels, {'grey' if images.channels == 1 else 'RGB'}, "
        f"intensities in 0..1 less {_numbers(images.mean)}, divided by {_numbers(images.std)}"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _decisions(pretrained: Pretrained) -> list[str]:
    """Returns the section on thresholds and early exit, when there are any."""
    count, exit_ = len(pretrained.thresholds), pretrained.early_exit
    lines = []
    if count:
        lines.append(
            f"- {count} of {pretrained.model.num_classes} classes have a threshold for their "
            "one-class classifier, in `config.json`."
        )
    if exit_ is not None:
        margins = ", ".join("none" if m is None else f"{m:.3f}" for m in exit_.margins)
        lines.append(f"- Early exit at the coded blocks' margins {margins}.")
    return ["## Thresholds and early exit", "", *lines, ""] if lines else []


def _table(notes: Mapping[str, Any], empty: str) -> list[str]:
    if not notes:
        return [empty]
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in _flat(notes)]
    return ["| | |", "|---|---|", *rows]


def _flat(notes: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Returns nested notes as rows, such as `config.epochs`."""
    rows: list[tuple[str, Any]] = []
    for key, value in notes.items():
        name = f"{before}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.5g}"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_cell, value))
    else:
        text = str(value)
    # A bar or a line break would end the cell.
    text = " ".join(printable(" ".join(text.replace("|", "/").split())).split())
    text = text if len(text) <= CELL else text[: CELL - 2] + ".."
    # What is left is text, whatever marks of Markdown or HTML it has, and no address a link.
    return re.sub(r"([\\`*\[\]<>&#!~]|:(?=//)|(?<=www)\.)", r"\\\1", text)
