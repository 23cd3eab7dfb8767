"""Runs of the tests under imitated processors: what is counted, and what is never called passed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import portability
import pytest
from portability import Processor, arithmetic_tests, describe, try_tests
from suite_runs import count_outcomes, table_head

PYTHON = Path(sys.executable)
TESTS = """
import os
def test_told(): assert os.environ["ATEN_CPU_CAPABILITY"] == "default"
def test_threads(): assert os.environ["OMP_NUM_THREADS"] == "1"
def test_wrong(): assert 1 + 1 == 3
"""


@pytest.mark.long
def test_a_row_says_what_is_in_effect_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(TESTS)
    processor = next(one for one in portability.PROCESSORS if one.kind == "without AVX")
    row = try_tests(processor, PYTHON, [str(tmp_path)], 1)
    assert (row["passed"], row["skipped"], row["failed"]) == (2, 0, 1)
    assert row["in_effect"]["ATen"] == "DEFAULT"
    [failure] = row["failures"]
    assert failure.endswith("test_wrong")
    assert describe(row).startswith("| without AVX, 1 thread | ATen DEFAULT; ")
    assert len(describe(row).split(" | ")) == table_head(*portability.COLUMNS).count("---")


def test_what_this_processor_lacks_is_not_called_passed() -> None:
    row = try_tests(Processor("future", needs=("no_such_flag",)), PYTHON, [], 1)
    assert row["not_run"] == "not on this processor: no_such_flag"
    assert row["failed"] == 0
    assert "passed" not in row
    expected = (
        f"| future, 1 thread | not on this processor: no_such_flag |  |  |  |  | {row['commit']} |"
    )
    assert describe(row) == expected


@pytest.mark.long
def test_a_setting_without_effect_is_a_failure() -> None:
    ignored = Processor("ignored", {"ATEN_CPU_CAPABILITY": "default"}, {"ATen": "AVX512"})
    row = try_tests(ignored, PYTHON, [], 1)
    assert row["failed"] == 1
    assert row["not_run"] == "no effect: ATen says DEFAULT"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("12 passed in 3.1s", (12, 0, 0)),
        ("1 failed, 2 passed, 3 skipped, 4 warnings, 1 error in 3s", (2, 3, 2)),
        ("no tests ran in 0.1s", (0, 0, 0)),
    ],
)
def test_counts_are_those_of_the_last_line(line: str, counts: tuple[int, int, int]) -> None:
    outcomes = count_outcomes(f"FAILED a.py::b - assert 7 failed\n=== {line} ===\n")
    assert (outcomes["passed"], outcomes["skipped"], outcomes["failed"]) == counts


def test_tests_of_arithmetic_are_found_by_what_they_compare() -> None:
    names = {Path(name).name for name in arithmetic_tests()}
    assert names >= {"test_resnext.py", "test_export.py", "test_aggregate.py", "test_removal.py"}
    assert not names & {"test_static.py", "test_browser.py", "test_cli.py"}


def test_rows_are_kept_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (Processor("one", needs=("no_such_flag",)), Processor("two", expected={"ATen": "none"}))
    monkeypatch.setattr(portability, "PROCESSORS", rows)
    monkeypatch.setattr(portability, "ask", lambda *_: {"ATen": "AVX2", "threads": 1})
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["portability.py", "--out", str(out), "--tests", "tests"])
    assert portability.main() == 1
    content = json.loads(out.read_text())
    assert [row["name"] for row in content["rows"]] == ["one, 1 thread", "two, 1 thread"]
    assert all(row["versions"]["torch"] for row in content["rows"])
    assert capsys.readouterr().out.count("\n| ") == 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows", "one"])
    assert portability.main() == 0
    assert json.loads(out.read_text()) == content


def test_the_table_of_the_docs_is_that_of_the_results() -> None:
    rows = json.loads(portability.OUT.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == [one.name for one in portability.PROCESSORS]
    text = (portability.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [describe(row) for row in rows if describe(row) not in text] == []
    assert not any(row["failed"] for row in rows)
