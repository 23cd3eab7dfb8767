"""The table of several runs, `reproduce.py --compare`."""

from __future__ import annotations

import json
from pathlib import Path

from support.script_runs import run_here

SCRIPT = Path(__file__).parents[2] / "train" / "reproduce.py"


def write_run(
    folder: Path, accuracy: float, *, coded: bool = True, seed: int = 0, **recipe: float
) -> Path:
    folder.mkdir(parents=True)
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
    config = {"network": {"coded": coded}, "training": {"seed": seed, **recipe}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_groups_means_and_deviations(tmp_path: Path) -> None:
    """asi#345: a removal is subtracted from the accuracy of the same images, not of all."""
    runs = [
        write_run(tmp_path / "coded-0", 0.98),
        write_run(tmp_path / "coded-1", 1.00, seed=1),
        write_run(tmp_path / "plain-0", 0.97, coded=False),
    ]
    result = run_here(SCRIPT, "--compare", *runs)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"|  | {runs[0]} (2 runs) | {runs[2]} (1 run) |"
    assert "| test accuracy | 99.00 ± 1.41 (98.00 to 100.00) | 97.00 ± ? |" in result.stdout
    assert "| one-class mean average precision | 0.9900 ± 0.0000" in result.stdout
    assert "| points without active branches 1 | -39.00 ± 1.41 (-40.00 to -38.00) |  |" in lines
    # What an evaluation had no time for has no row.
    assert "points without inactive branches 1" not in result.stdout
    assert "| points without inactive branches 2 | 0.00 ± 0.00 (0.00 to 0.00) |  |" in lines


def test_runs_of_one_recipe_are_a_group_and_no_others(tmp_path: Path) -> None:
    """asi#345: mu = 1 and mu = 6 were averaged as "4 runs", for their folders' last number."""
    runs = [
        write_run(tmp_path / name / str(seed), accuracy, seed=seed, coding_weight=mu)
        for name, mu, accuracies in (("mu6", 6.0, (0.9, 0.92)), ("mu1", 1.0, (0.1, 0.12)))
        for seed, accuracy in enumerate(accuracies)
    ]
    result = run_here(SCRIPT, "--compare", *runs)
    assert "| test accuracy | 91.00 ± 1.41 (90.00 to 92.00) | 11.00 ± 1.41 " in result.stdout
    assert "in the first group training.coding_weight was 6.0, is 1.0" in result.stdout
    alike = [
        write_run(tmp_path / f"cifar{classes}", accuracy, classes=classes)
        for classes, accuracy in ((10, 0.94), (100, 0.78))
    ]
    result = run_here(SCRIPT, "--compare", *alike)
    assert "| test accuracy | 94.00 ± ? | 78.00 ± ? |" in result.stdout


def test_a_run_counts_once(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 0.9) for name in ("a", "b")]
    for pair in (runs, runs[:1] * 2):
        result = run_here(SCRIPT, "--compare", *pair)
        assert result.returncode == 2
        assert "have the same recipe and seed 0" in result.stderr


def test_unfinished_run_is_named(tmp_path: Path) -> None:
    result = run_here(SCRIPT, "--compare", tmp_path)
    assert result.returncode == 2
    assert "no summary; is the run finished?" in result.stderr
