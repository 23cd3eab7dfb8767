"""Models on disk: safetensors with everything that rebuilds the network in the header.

The header holds `format_version`, the architecture, the codebooks with the class order, the
preprocessing and how the network was trained. Nothing in such a file is executed on loading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .codebook import Codebook
from .data import Preprocessing
from .models import CodedResNeXt

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
_HEADER = "coded_resnext"


@dataclass(frozen=True)
class LoadedModel:
    """What a model file holds."""

    model: CodedResNeXt
    """In evaluation mode."""
    preprocessing: Preprocessing | None
    training: dict[str, Any]
    """How the network was trained, as the trainer wrote it."""


def save_model(
    path: str | Path,
    model: CodedResNeXt,
    *,
    preprocessing: Preprocessing | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a network with its codebooks and classes; an older file stays until this is complete.

    Args:
        path: the file, usually `model.safetensors`.
        model: the network.
        preprocessing: how images become its input.
        training: JSON-ready notes on how it was trained.

    Raises:
        ValueError: the network has no classifier, so that nothing could be made of the file.
    """
    if not isinstance(model.head, nn.Linear):
        raise ValueError("model: expected a network with its classifier, got one without")
    description = {
        "format_version": FORMAT_VERSION,
        **describe_network(model),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "training": training or {},
    }
    write_tensors(path, model.state_dict(), description)


def describe_network(model: CodedResNeXt) -> dict[str, Any]:
    """Architecture, classes and codebooks, JSON-ready: what weights must fit."""
    return {
        "config": model.config,
        "class_names": list(model.class_names),
        "codebooks": [codebook.to_dict() for codebook in model.stage_codebooks],
    }


def load_model(path: str | Path, *, codebooks: Sequence[Codebook] | None = None) -> LoadedModel:
    """Read a network written by `save_model`.

    Args:
        path: the file, or the folder of a run that has one.
        codebooks: the codebooks that the caller expects, one for each coded stage.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, one of another format version, or one whose codewords or
            class order differ from those expected.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MODEL_FILE
    description, state = read_tensors(path)
    if "kind" in description:
        raise ValueError(
            f"{path}: expected a whole network, got a part of one; load_extracted reads it"
        )
    try:
        stored = [Codebook.from_dict(data) for data in description["codebooks"]]
        model = CodedResNeXt.from_config(
            description["config"], stored, class_names=description["class_names"]
        )
        model.to(state["head.weight"].dtype)
        model.load_state_dict(state)
        preprocessing = description["preprocessing"]
        if preprocessing is not None:
            preprocessing = Preprocessing.from_dict(preprocessing)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged or incomplete model file: {error}") from error
    if codebooks is not None:
        check_codebooks(stored, codebooks)
    return LoadedModel(model.eval(), preprocessing, description["training"])


def write_tensors(
    path: str | Path, state: Mapping[str, Tensor], description: dict[str, Any]
) -> None:
    """Write tensors under a JSON description, its `format_version` included."""
    tensors = {name: value.contiguous() for name, value in state.items()}
    write_atomically(path, save(tensors, metadata={_HEADER: json.dumps(description)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of other software, or one of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a model file, found none")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            # A safe_open handle is no mapping; it has keys() alone.
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable model file: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path}: a safetensors file, but not one of a Coded ResNeXt")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: expected {FORMAT_VERSION}, "
            f"got {description.get('format_version')!r}"
        )
    return description, state


def check_codebooks(stored: Sequence[Codebook], expected: Sequence[Codebook]) -> None:
    """Refuse codebooks that differ from those of a checkpoint.

    Raises:
        ValueError: says whether their number, their classes or class order, or the codewords of
            which stage differ.
    """
    if len(stored) != len(expected):
        raise ValueError(
            f"codebooks: expected {len(stored)} as in the checkpoint, got {len(expected)}"
        )
    for stage, (ours, theirs) in enumerate(zip(stored, expected, strict=True), 1):
        if ours.class_names != theirs.class_names:
            raise ValueError(
                "codebooks: expected the classes and class order of the checkpoint "
                f"({', '.join(ours.class_names[:5])}, ..), got "
                f"{', '.join(theirs.class_names[:5])}, .."
            )
        if ours.words != theirs.words:
            raise ValueError(
                f"codebooks: the codewords of coded stage {stage} differ from the checkpoint's"
            )


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: names the file; what it held before is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write ({error.strerror or error}); older files are intact",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
