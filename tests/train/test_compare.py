"""The table of several runs."""

from __future__ import annotations

import json
from pathlib import Path

from script_runs import run_here

SCRIPT = Path(__file__).parents[2] / "train" / "compare.py"


def write_run(folder: Path, accuracy: float, *, coded: bool) -> None:
    folder.mkdir()
    summary = {
        "test_accuracy": accuracy,
        "early_decoding": [0.9, 0.95] if coded else [],
        "single_class_average_precision": [0.98, None, 1.0] if coded else [],
        "removal_accuracy": accuracy - 0.1 if coded else None,
        "remove_active_accuracy": [0.5, 0.6] if coded else [],
        "remove_inactive_accuracy": [None, accuracy - 0.1] if coded else [],
        "seconds": 10.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def test_groups_means_and_deviations(tmp_path: Path) -> None:
    """asi#345: a removal is subtracted from the accuracy of the same images, not of all."""
    write_run(tmp_path / "coded-0", 0.98, coded=True)
    write_run(tmp_path / "coded-1", 1.00, coded=True)
    write_run(tmp_path / "plain-0", 0.97, coded=False)
    runs = sorted(tmp_path.iterdir())
    result = run_here(SCRIPT, *runs)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "|  | coded (2 runs) | plain (1 runs) |"
    assert "| test accuracy | 99.00 ± 1.41 (98.00 to 100.00) | 97.00 ± ? |" in result.stdout
    assert "| one-class mean average precision | 0.9900 ± 0.0000" in result.stdout
    assert "| points without active branches 1 | -39.00 ± 1.41 (-40.00 to -38.00) |  |" in lines
    # What an evaluation had no time for has no row.
    assert "points without inactive branches 1" not in result.stdout
    assert "| points without inactive branches 2 | 0.00 ± 0.00 (0.00 to 0.00) |  |" in lines


def test_unfinished_run_is_named(tmp_path: Path) -> None:
    result = run_here(SCRIPT, tmp_path)
    assert result.returncode == 2
    assert "no summary; is the run finished?" in result.stderr
