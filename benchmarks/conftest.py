"""Results of a benchmark run: rows with the machine and the versions that they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the recorded rows to this JSON file")
    parser.addoption(
        "--dry", action="store_true", help="GPU benchmarks at tiny sizes on the CPU, interpreted"
    )
    parser.addoption("--photographs", type=Path, help="folder of JPEGs, for bench_input.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    if config.getoption("--dry"):
        # Read as Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Adds a row to the results of the run."""
    return request.config.stash[ROWS].append


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--results"), session.config.stash[ROWS]
    if path is not None and rows:
        # Not at the top, since it imports Triton.
        from coded_resnext.training.run_folder import describe_machine

        content = {"machine": describe_machine(), "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
