"""Where a result comes from: machine, versions, commit, date; no person, no host."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .run_folder import versions


def describe_machine() -> dict[str, Any]:
    """Processor, threads, GPU if there is one, versions, commit and date."""
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
    """Of the source that is running; "-dirty" where it has been changed since."""
    file = Path(__file__).resolve()
    git = ("git", "-C", str(file.parent))
    # An installed copy may lie inside a repository that it is no part of.
    if not _output(*git, "ls-files", file.name):
        return "unknown"
    return _output(*git, "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _output(*command: str) -> str:
    """What a command prints, or nothing where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
