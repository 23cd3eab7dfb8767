"""Results of a benchmark run: rows with the machine and the versions that they come from."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coded_resnext.run_folder import versions

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the recorded rows to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Adds a row to the results of the run."""
    return request.config.stash[ROWS].append


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--results"), session.config.stash[ROWS]
    if path is not None and rows:
        content = {"machine": describe_machine(), "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """Processor, threads, versions, commit and date; nothing that names a person or a host."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
