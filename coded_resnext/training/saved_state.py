"""Checkpoints of a run: written whole or not at all, checked when they are read.

Each is a file of tensors and plain values under `checkpoints/`, with its SHA-256 beside it in the
format of `sha256sum`. The last two are kept, so that there is one to go back to.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coded_resnext.files import (
    brief,
    load_tensors,
    make_folder,
    open_folder,
    own_folder,
    parse_json,
    say,
    write_atomically,
)

FOLDER = "checkpoints"
STATE_VERSION = 1
KEPT = 2


def save_state(run: Path, name: str, state: dict[str, Any]) -> Path:
    """Write a checkpoint and remove those before the last two.

    Args:
        run: the run's folder.
        name: sorts after the names of earlier checkpoints; a readable one of the same name is the
            same state, and is left as it is.
        state: tensors and plain values.

    Returns:
        The file.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that were there are intact.
    """
    folder = make_folder(run, FOLDER)
    path = folder / f"{name}.pt"
    if _is_whole(path):
        return path
    buffer = io.BytesIO()
    torch.save({"state_version": STATE_VERSION, **state}, buffer)
    content = buffer.getvalue()
    # The sum first: a process killed in between leaves a sum without a file, which is nothing.
    line = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    write_atomically(_sum_path(path), line.encode())
    write_atomically(path, content)
    _tidy(folder)
    return path


def load_state(run: Path) -> dict[str, Any] | None:
    """Returns the last readable checkpoint, on the CPU, or None for a run that has none.

    A damaged one is named on stderr, renamed to `.damaged`, and the one before it is used.
    Nothing in a file is executed.

    Raises:
        ValueError: there are checkpoints and none is readable, or the last is of another version.
    """
    folder = own_folder(run, FOLDER)
    paths = sorted(folder.glob("*.pt"), reverse=True)
    for path in paths:
        try:
            content = _read(path)
            state = load_tensors(io.BytesIO(content))
            if not isinstance(state, dict):
                raise ValueError(f"expected a checkpoint, got {type(state).__name__}")
        # A disk that cannot read a file has damaged it too.
        except (ValueError, OSError) as error:
            say(f"{path}: damaged checkpoint ({error}); using the one before it", file=sys.stderr)
            with open_folder(folder) as (opened, names):
                aside = names / f"{path.stem}.damaged"
                os.replace(names / path.name, aside, src_dir_fd=opened, dst_dir_fd=opened)
            continue
        if state.get("state_version") != STATE_VERSION:
            raise ValueError(
                f"{path}: state_version: expected {STATE_VERSION}, "
                f"got {brief(state.get('state_version'))}"
            )
        if isinstance(history := state.get("history"), str):
            state["history"] = list(map(parse_json, history.splitlines()))
        return state
    if paths or any(folder.glob("*.damaged")):
        raise ValueError(
            f"{folder}: no checkpoint is readable; begin a new run in another folder, from "
            "model.safetensors if that is whole"
        )
    return None


def _read(path: Path) -> bytes:
    """Returns the content of a checkpoint that fits its sum; a ValueError says what is wrong."""
    try:
        expected = _sum_path(path).read_text(encoding="ascii").split()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError("its .sha256 is missing or unreadable") from error
    content = path.read_bytes()
    if expected != [hashlib.sha256(content).hexdigest(), path.name]:
        raise ValueError("its content does not fit its .sha256")
    return content


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _sum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _tidy(folder: Path) -> None:
    """Remove what older checkpoints and killed processes have left, and no other file."""
    with open_folder(folder) as (opened, names):
        present = os.listdir(folder if opened is None else opened)
        kept = sorted(name for name in present if fnmatchcase(name, "step-*.pt"))[-KEPT:]
        wanted = {*kept, *(f"{name}.sha256" for name in kept)}
        ours = ("step-*.pt", "step-*.pt.sha256", ".step-*.tmp")
        for name in present:
            if name not in wanted and any(fnmatchcase(name, pattern) for pattern in ours):
                os.unlink(names / name, dir_fd=opened)


def get_rng_state() -> dict[str, Any]:
    """The states of the default generators of Python, NumPy and PyTorch, the GPU's included."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position),
        "numpy_gauss": (has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go back to what `get_rng_state` returned."""
    random.setstate(state["python"])
    name, keys, position = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (name, keys.numpy().astype(np.uint32), position, *state["numpy_gauss"])
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
