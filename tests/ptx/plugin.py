"""A pytest plugin: kernels run as compiled for a GPU, in the executor of this folder.

    PYTHONPATH=tests python -m pytest -p ptx.plugin --arch sm80 tests/ptx/compiled_*.py

A launch in which a check sees something raises, and so fails its test. The files named `compiled_*`
are tests for such a process alone; tests/ptx/test_ptx.py starts a quarter of them from the suite.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from ptx import driver


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", default="sm80", choices=list(driver.SHARED_MEMORY))
    parser.addoption("--quarter", action="store_true", help="every fourth test")


def pytest_configure(config: pytest.Config) -> None:
    driver.run_project_on(config.option.arch)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quarter:
        items[:] = items[::4]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What has run here; workers of pytest-xdist keep theirs to themselves."""
    launches: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, code, seconds in driver.RAN:
        launches[name].append((code, seconds))
    for name, ran in sorted(launches.items()):
        compiled, seconds = len({code for code, _ in ran}), sum(time for _, time in ran)
        terminalreporter.write_line(
            f"{name:32} {len(ran):4} launches of {compiled:3} compiled kernels, {seconds:6.1f} s"
        )


@pytest.fixture
def arch(request: pytest.FixtureRequest) -> str:
    """The architecture that kernels are compiled for."""
    return str(request.config.option.arch)
