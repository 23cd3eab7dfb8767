"""The folder of a training run: configuration, logs, state for resuming, model and summary."""

from __future__ import annotations

import csv
import io
import json
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import (
    MODEL_FILE,
    load_training_state,
    save_training_state,
    write_atomically,
)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.csv"
STATE_FILE = "state.pt"
SUMMARY_FILE = "summary.json"


class RunFolder:
    """Opens, or makes, the folder of a run.

    Args:
        path: the folder.
        config: JSON-ready description of the run; a run is only resumed under the same one.
        resume: go on with the run that the folder holds, if it holds one.

    Raises:
        ValueError: the folder holds a run and `resume` is not set, or one of another
            configuration; the message says what differs.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        config_path = self.path / CONFIG_FILE
        # As read back from JSON, so that tuples and lists compare equal.
        config = json.loads(json.dumps(config))
        if config_path.exists():
            if not resume:
                raise ValueError(
                    f"out: {self.path} holds a run already; resume it (--resume) or choose "
                    "another folder"
                )
            stored = json.loads(config_path.read_text(encoding="utf-8"))
            differing = sorted(
                key for key in stored.keys() | config.keys() if stored.get(key) != config.get(key)
            )
            if differing:
                changes = "; ".join(
                    f"{key} was {stored.get(key)!r}, is {config.get(key)!r}" for key in differing
                )
                raise ValueError(f"out: {self.path} holds a run of another kind: {changes}")
        else:
            self.write_json(CONFIG_FILE, config)

    @property
    def model_path(self) -> Path:
        """Where the model of the last finished epoch is."""
        return self.path / MODEL_FILE

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file; NaN is refused, since JSON has none."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path / name, text.encode())
        return self.path / name

    def write_metrics(self, history: Sequence[dict[str, float]]) -> None:
        """Write the CSV log: one row for every epoch."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.path / METRICS_FILE, buffer.getvalue().encode())

    def save_state(self, state: dict[str, Any]) -> None:
        """Write what resuming needs."""
        save_training_state(self.path / STATE_FILE, state)

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` wrote last, or None for a run that has not begun."""
        path = self.path / STATE_FILE
        return load_training_state(path) if path.exists() else None


class TensorBoardLog:
    """Scalars for TensorBoard, when it is installed.

    Args:
        folder: where the event files go.
        first_epoch: rows of this epoch and later ones, left by an interrupted run, are dropped.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        try:
            # The writer's import goes through a module that its own library deprecates.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("TensorBoard is not installed: its logs are left out", file=sys.stderr)
            self._writer = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def write(self, epoch: int, row: dict[str, float]) -> None:
        """Add the values of an epoch."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    from importlib.metadata import version

    return {
        "coded_resnext": version("coded-resnext"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
