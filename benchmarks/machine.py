"""Where a result comes from: machine, versions, commit, date; no person, no host."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coded_resnext.run_folder import versions


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
        "versions": {**versions(), "triton": version("triton")},
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = _output(*query).splitlines()
        described["gpu"] = torch.cuda.get_device_name()
        described["driver"] = driver[0] if driver else "unknown"
    return described


def _output(*command: str) -> str:
    """What a command prints, or nothing where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
