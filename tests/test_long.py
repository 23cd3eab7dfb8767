"""Tests marked long: left out of `make test`, which says how many, and run with --all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
def test_short(): pass
@pytest.mark.long
def test_long(): pass
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.long)])
def test_some(n): pass
"""
SETTINGS = "[pytest]\nmarkers = long: takes minutes\n"


@pytest.mark.parametrize("workers", [(), ("-p", "xdist.plugin", "-n", "2", "--dist", "loadfile")])
def test_long_tests_are_left_out_and_counted(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "test_both.py").write_text(TESTS)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)

    def said(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers, *options]
        return subprocess.run(
            command,
            cwd=tmp_path,
            # Of the plugins that are installed none but the one that is asked for is loaded.
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    text = said()
    assert "2 passed" in text
    assert "2 long tests were left out: `make test-all`, or pytest with --all" in text
    text = said("--all")
    assert "4 passed" in text
    assert "left out" not in text
