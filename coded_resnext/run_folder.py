"""The folder of a training run: configuration, logs, state for resuming, model and summary."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .atomic_file import write_atomically
from .checkpoint import MODEL_FILE
from .distributed import World
from .run_lock import lock_folder
from .text_files import read_json
from .training_state import load_state, save_state

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "summary.json"
BEST_FILE = "best.safetensors"
AVERAGE_FILE = "model_ema.safetensors"
DEAD_FILE = "dead_branches.json"
# These change what is shown and how often it is saved, not what comes out.
FREE_SETTINGS = ("log_interval", "recovery_interval", "log_wandb", "detect_dead_branches")


class RunFolder:
    """Opens, or makes, the folder of a run.

    Args:
        path: the folder.
        config: JSON-ready description of the run; a run is only resumed under the same one.
        resume: go on with the run that the folder holds, if it holds one.
        world: the processes of the run; the main one alone looks at the folder and writes to it.

    Raises:
        ValueError: another process trains in the folder; it holds a run and `resume` is not set,
            or one of another configuration; the message says what differs.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        world: World | None = None,
    ) -> None:
        self.path = Path(path)
        # As read back from JSON, so that tuples and lists compare equal.
        self.config = json.loads(json.dumps(config))
        (world or World()).on_main(lambda: self._open(resume=resume))

    def _open(self, *, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        lock_folder(self.path)
        config_path = self.path / CONFIG_FILE
        if not config_path.exists():
            self.write_json(CONFIG_FILE, self.config)
            return
        if not resume:
            raise ValueError(
                f"out: {self.path} holds a run already; resume it (--resume) or choose "
                "another folder"
            )
        try:
            stored = read_json(config_path)
        except ValueError as error:
            raise ValueError(f"{config_path}: not the configuration of a run: {error}") from error
        differing = differences(stored, self.config, ignore=FREE_SETTINGS)
        if differing:
            raise ValueError(
                f"out: {self.path} holds a run of another kind: {'; '.join(differing)}"
            )
        # What a process left that was killed while it wrote.
        for stale in self.path.glob(".*.tmp"):
            stale.unlink()

    @property
    def model_path(self) -> Path:
        """Where the model of the last finished epoch is."""
        return self.path / MODEL_FILE

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file; NaN is refused, since JSON has none."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path / name, text.encode())
        return self.path / name

    def write_metrics(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write the CSV log: one row for every epoch."""
        buffer = io.StringIO()
        # Settings that may change within a run add columns.
        columns = list(dict.fromkeys(name for row in history for name in row))
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.path / METRICS_FILE, buffer.getvalue().encode())

    def save_state(self, name: str, state: dict[str, Any]) -> Path:
        """Write a checkpoint, see `training_state.save_state`."""
        return save_state(self.path, name, state)

    def load_state(self) -> dict[str, Any] | None:
        """The last readable checkpoint, or None for a run that has not begun."""
        return load_state(self.path)


def differences(stored: Any, current: Any, *, ignore: Sequence[str] = ()) -> list[str]:
    """Where two JSON values differ, as "KEY.KEY was VALUE, is VALUE".

    Args:
        stored: of the run or file.
        current: of now.
        ignore: keys that do not matter, at any depth.
    """
    if isinstance(stored, dict) and isinstance(current, dict):
        keys = [key for key in {**stored, **current} if key not in ignore]
        pairs = [(key, stored.get(key), current.get(key)) for key in keys]
    elif isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
        pairs = [
            (f"{index}", a, b) for index, (a, b) in enumerate(zip(stored, current, strict=True))
        ]
    else:
        return [] if stored == current else [f"was {_shown(stored)}, is {_shown(current)}"]
    found = []
    for key, a, b in pairs:
        for text in differences(a, b, ignore=ignore):
            found.append(f"{key} {text}" if text.startswith("was ") else f"{key}.{text}")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}.."


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    from importlib.metadata import version

    return {
        "coded_resnext": version("coded-resnext"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
