"""Networks to share: a folder of safetensors, JSON and a model card, on disk or on the Hub.

`model.safetensors` is what `checkpoint.save_model` writes; `config.json` says the same without the
weights, and has the thresholds, the criterion of early exit, results, and the weights' SHA-256.
Nothing in either is executed on loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .atomic_file import write_atomically
from .checkpoint import MODEL_FILE, UNFIT, load_model, save_model
from .data import Preprocessing
from .early_exit import EarlyExit
from .model_card import model_card
from .models import CodedResNeXt
from .text_files import read_json

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE)


@dataclass(frozen=True)
class Pretrained:
    """A network with all that is needed to use it, and what is known about it."""

    model: CodedResNeXt
    """In evaluation mode when it was loaded."""
    preprocessing: Preprocessing | None = None
    """How images become its input."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of one-class classifiers, by class; where one was chosen."""
    early_exit: EarlyExit | None = None
    """When an image may leave early."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """How the network was trained, JSON-ready."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, JSON-ready."""
    name: str = "Coded ResNeXt"
    """Title of the card."""
    license: str | None = None
    """Identifier of the weights' licence, such as `mit`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.thresholds) - set(self.model.class_names))
        if unknown:
            raise ValueError(f"thresholds: expected classes of the model, got {unknown[0]!r}")
        blocks = len(self.model.coded_blocks)
        if self.early_exit is not None and len(self.early_exit.margins) != blocks:
            raise ValueError(
                f"early_exit: expected a margin for each of {blocks} coded blocks, "
                f"got {len(self.early_exit.margins)}"
            )

    def description(self) -> dict[str, Any]:
        """What `config.json` says, but for the checksum."""
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


def save_pretrained(pretrained: Pretrained, folder: str | Path) -> Path:
    """Write a network with its description and card; the description, with the checksum, last.

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
    description["sha256"] = {MODEL_FILE: _digest(folder / MODEL_FILE)}
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())
    return folder


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Pretrained:
    """Read what `save_pretrained` wrote, from a folder or from the Hugging Face Hub.

    Args:
        source: a folder, or, where there is none of that name, `OWNER/NAME` on the Hub.
        revision: branch, tag or commit on the Hub.
        token, cache_dir: as `huggingface_hub` has them.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a damaged file, one of another format version, or weights whose checksum or
            architecture is not the one in the description.
        ImportError: huggingface_hub is missing; the message names the extra.
        OSError: the Hub cannot be reached, or has no such network.
    """
    if Path(source).is_dir():
        folder = Path(source)
    else:
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
    digest = _digest(weights)
    if digest != expected:
        raise ValueError(
            f"{weights}: expected SHA-256 {expected} as in {CONFIG_FILE}, got {digest}"
        )
    loaded = load_model(weights)
    try:
        early_exit = description["early_exit"]
        found = Pretrained(
            loaded.model,
            loaded.preprocessing,
            description["thresholds"],
            None if early_exit is None else EarlyExit.from_dict(early_exit),
            description["training"],
            description["results"],
            description["name"],
            description["license"],
        )
        for key, value in _architecture(found).items():
            if description[key] != value:
                raise ValueError(f"{key}: expected what {MODEL_FILE} has, got another")
    except UNFIT as error:
        raise ValueError(f"{path}: damaged or incomplete description: {error}") from error
    return found


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload a Coded ResNeXt",
) -> str:
    """Upload a folder that `save_pretrained` wrote to the Hugging Face Hub, after reading it once.

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
    from_pretrained(folder)
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
    """The part of the description that the weights' own header has too, as JSON gives it back."""
    description = pretrained.description()
    keys = ("architecture", "class_names", "codebooks", "preprocessing")
    part: dict[str, Any] = json.loads(json.dumps({key: description[key] for key in keys}))
    return part


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(
    repository: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    """Fetch weights and description into the Hub's cache; the folder that holds them."""
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
