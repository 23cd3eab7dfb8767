"""The folder of a training run: configuration, logs, checkpoints, model and summary.

Each checkpoint is a file of tensors and plain values under `checkpoints/`, with its SHA-256 beside
it in the format of `sha256sum`. It is written whole or not at all, and checked when it is read. The
last two are kept, so that there is one to go back to.
"""

from __future__ import annotations

import csv
import datetime
import errno
import hashlib
import io
import json
import os
import platform
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coded_resnext import __version__
from coded_resnext.files import (
    as_text,
    brief,
    load_tensors,
    make_folder,
    open_folder,
    own_folder,
    parse_json,
    read_json,
    say,
    write_atomically,
)
from coded_resnext.models.checkpoint import MODEL_FILE

from .processes import World

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "summary.json"
BEST_FILE = "best.safetensors"
AVERAGE_FILE = "model_ema.safetensors"
DEAD_FILE = "dead_branches.json"
# These change what is shown and how often it is saved, not what comes out.
FREE_SETTINGS = ("log_interval", "recovery_interval", "log_wandb", "detect_dead_branches")
LOCK_FILE = ".lock"
# Open files by process and folder: closing any of them would let the lock go. A forked process
# has the dictionary and not the locks.
_held: dict[tuple[int, Path], int] = {}
FOLDER = "checkpoints"
STATE_VERSION = 1
KEPT = 2


class RunFolder:
    """Opens, or makes, the folder of a run.

    Args:
        path: the folder.
        config: JSON-ready description of the run; a run is only resumed under the same one.
        resume: go on with the run that the folder holds, if it holds one.
        world: the processes of the run; the main one alone looks at the folder and writes to it.

    Raises:
        ValueError: the path is not UTF-8; another process trains in the folder; it holds a run and
            `resume` is not set, or one of another configuration; the message says what differs.
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
        if as_text(path) != str(path):
            raise ValueError(
                f"out: expected UTF-8, since TensorBoard takes no other, got {as_text(path)}"
            )
        # As read back from JSON, so that tuples and lists compare equal.
        self.config = json.loads(json.dumps(config))
        self._logged: tuple[int, list[str]] | None = None
        """Rows and columns that this process has written to the log."""
        self._rows: list[str] = []
        """The history as it was saved last, a row each."""
        (world or World()).on_main(lambda: self._open(resume=resume))

    def _open(self, *, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        lock_folder(self.path)
        # What a process left that was killed while it wrote.
        for stale in self.path.glob(".*.tmp"):
            stale.unlink()
        config_path = self.path / CONFIG_FILE
        # A start that failed before its first checkpoint is no run.
        begun = (self.model_path, *(self.path / "checkpoints").glob("step-*"))
        if not config_path.exists() or not any(path.exists() for path in begun):
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

    @property
    def model_path(self) -> Path:
        """Returns the path of the model of the last finished epoch."""
        return self.path / MODEL_FILE

    def write_json(self, name: str, content: Any) -> Path:
        """Writes a JSON file; NaN is refused, since JSON has none."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path / name, text.encode())
        return self.path / name

    def write_metrics(self, history: Sequence[Mapping[str, float]]) -> None:
        """Writes the CSV log, a row for every epoch; where only the last is new, it is appended."""
        # Settings that may change within a run add columns.
        columns = list(dict.fromkeys(name for row in history[-2:] for name in row))
        path = self.path / METRICS_FILE
        if self._logged == (len(history) - 1, columns) and path.is_file():
            flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(path, flags), "w", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns, lineterminator="\n").writerow(history[-1])
                file.flush()
                os.fsync(file.fileno())
        else:
            columns = list(dict.fromkeys(name for row in history for name in row))
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
            write_atomically(path, buffer.getvalue().encode())
        self._logged = (len(history), columns)

    def save_state(self, name: str, state: dict[str, Any]) -> Path:
        """Writes a checkpoint, see `save_state`; of the history only what is new."""
        history = state.get("history", [])
        self._rows = [*self._rows[: len(history)], *map(json.dumps, history[len(self._rows) :])]
        return save_state(self.path, name, {**state, "history": "\n".join(self._rows)})

    def load_state(self) -> dict[str, Any] | None:
        """Returns the last readable checkpoint, or None for a run that has not begun."""
        return load_state(self.path)


def refuse_links(folder: Path) -> None:
    """Refuses a run's folder with parts that are links: what is written would be elsewhere."""
    with os.scandir(folder) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    if links:
        raise ValueError(
            f"out: {folder}: expected files and folders of its own, got links: {', '.join(links)}"
        )


def differences(
    stored: Any,
    current: Any,
    *,
    ignore: Sequence[str] = (),
    words: tuple[str, str] = ("was", "is"),
) -> list[str]:
    """Lists where two JSON values differ, as "KEY.KEY was VALUE, is VALUE".

    Args:
        stored: of the run or file.
        current: of now.
        ignore: keys that do not matter, at any depth.
        words: before the one value and before the other.
    """
    return [
        f"{path} {words[0]} {brief(a)}, {words[1]} {brief(b)}".lstrip()
        for path, a, b in _differing(stored, current, ignore)
    ]


def _differing(stored: Any, current: Any, ignore: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the paths at which two JSON values differ, joined by dots, with both values."""
    if isinstance(stored, dict) and isinstance(current, dict):
        keys = [key for key in {**stored, **current} if key not in ignore]
        pairs = [(key, stored.get(key), current.get(key)) for key in keys]
    elif isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
        pairs = [
            (f"{index}", a, b) for index, (a, b) in enumerate(zip(stored, current, strict=True))
        ]
    else:
        if stored != current:
            yield "", stored, current
        return
    for key, a, b in pairs:
        for path, first, second in _differing(a, b, ignore):
            yield (f"{key}.{path}" if path else key), first, second


def require_same(world: World, description: Mapping[str, Any]) -> None:
    """Refuses processes of one run that were told different things.

    All processes must call this, before the first step whose result would be one of both.

    Args:
        world: the processes of the run.
        description: JSON-ready; of this process.

    Raises:
        ValueError: on all processes; the message says what differs.
    """
    text = json.dumps(description, sort_keys=True)
    digests = world.gather(hashlib.sha256(text.encode()).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        described = [json.loads(part) for part in world.gather(text)]
        words = ("on process 0", f"on process {others[0]}")
        differing = differences(described[0], described[others[0]], words=words)
        raise ValueError(f"processes: expected the same on all of a run: {'; '.join(differing)}")


def versions() -> dict[str, str]:
    """Returns the versions of everything that a result depends on."""
    return {
        "coded_resnext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def describe_machine() -> dict[str, Any]:
    """Returns processor, threads, GPU if there is one, versions, commit and date."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    described: dict[str, Any] = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "triton": _triton_version()},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = _output(*query).splitlines()
        described["gpu"] = torch.cuda.get_device_name()
        described["driver"] = driver[0] if driver else "unknown"
    return described


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Returns the commit that is running; "-dirty" where it has been changed since."""
    file = Path(__file__).resolve()
    git = ("git", "-C", str(file.parent))
    # An installed copy may lie inside a repository that it is no part of.
    if not _output(*git, "ls-files", file.name):
        return "unknown"
    return _output(*git, "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _output(*command: str) -> str:
    """Returns what a command prints, or nothing where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def lock_folder(folder: Path) -> None:
    """Keeps a folder for this process until it ends.

    Raises:
        ValueError: another process holds it; the message says which.
        OSError: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        return
    path = folder / LOCK_FILE
    key = (os.getpid(), folder.resolve())
    former = _held.get(key)
    if former is not None:
        if path.exists() and os.path.samestat(os.fstat(former), path.stat()):
            return
        # The folder was removed, and another is in its place.
        os.close(_held.pop(key))
    if path.is_symlink():
        raise ValueError(f"out: {path}: expected a file, got a link; remove it")
    # The flag closes the gap between the question and the opening.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        # Of the process and not of the open file: loader workers that outlive it hold nothing.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"out: {folder} is being written by another training ({holder}); wait for it, or "
                "choose another folder"
            ) from error
        say(
            f"{folder}: its file system has no locks; nothing keeps a second training out of it",
            file=sys.stderr,
        )
        return
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[key] = file


def save_state(run: Path, name: str, state: dict[str, Any]) -> Path:
    """Writes a checkpoint and removes those before the last two.

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
    """Removes what older checkpoints and killed processes have left, and no other file."""
    with open_folder(folder) as (opened, names):
        present = os.listdir(folder if opened is None else opened)
        kept = sorted(name for name in present if fnmatchcase(name, "step-*.pt"))[-KEPT:]
        wanted = {*kept, *(f"{name}.sha256" for name in kept)}
        ours = ("step-*.pt", "step-*.pt.sha256", ".step-*.tmp")
        for name in present:
            if name not in wanted and any(fnmatchcase(name, pattern) for pattern in ours):
                os.unlink(names / name, dir_fd=opened)


def get_rng_state() -> dict[str, Any]:
    """Returns the states of the default generators of Python, NumPy and PyTorch, the GPU's
    included."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position),
        "numpy_gauss": (has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Goes back to what `get_rng_state` returned."""
    random.setstate(state["python"])
    name, keys, position = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (name, keys.numpy().astype(np.uint32), position, *state["numpy_gauss"])
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
