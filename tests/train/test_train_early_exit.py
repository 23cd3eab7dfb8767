"""Cross-validating the margins of early exit, short: two folds of two epochs each."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.script_runs import run_here

from coded_resnext import EarlyExit, create_model
from coded_resnext.data.datasets import DIGITS_NAME
from coded_resnext.models.checkpoint import save_model
from coded_resnext.training.config import TrainingConfig

SCRIPT = Path(__file__).parents[2] / "train" / "early_exit.py"
CONFIG = TrainingConfig(epochs=2, batch_size=32, lr=0.1)


def early_exit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def make_run(folder: Path, config: TrainingConfig, data: str = DIGITS_NAME) -> Path:
    """A run of an untrained network."""
    torch.manual_seed(config.seed)
    folder.mkdir()
    model = create_model("coded_resnext_digits")
    training = {"config": config.to_dict(), "data": data}
    save_model(folder / "model.safetensors", model, training=training)
    return folder


@pytest.mark.long
def test_margins_for_runs_of_one_recipe(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), replace(CONFIG, seed=seed)) for seed in (0, 1)]
    folds = tmp_path / "folds"
    options = (
        "--folds",
        2,
        "--folds-out",
        folds,
        "--max-accuracy-loss",
        0.05,
        "--rounds",
        1,
    )
    result = early_exit(*runs, *options)
    assert result.returncode == 0, result.stderr
    criteria = [EarlyExit.load(run / "early_exit.json") for run in runs]
    assert criteria[0] == criteria[1]
    calibration = criteria[0].calibration
    assert calibration["samples"] == 1437
    lost = calibration["held_out_accuracy"] - calibration["held_out_early_accuracy"]
    assert lost <= 0.05 + 1e-9
    # The fold networks have been trained: an untrained one is right about a tenth.
    assert calibration["held_out_accuracy"] > 0.2
    measured = json.loads((runs[1] / "early_exit_test.json").read_text())
    assert sum(measured["exits"]) == measured["test_images"] == 360
    assert measured["early_ms_batch_1"] > 0

    # The folds are kept: again, and nothing is trained.
    model = folds / "fold-2" / "model.safetensors"
    written = model.stat().st_mtime_ns
    assert early_exit(runs[0], *options).returncode == 0
    assert model.stat().st_mtime_ns == written
    assert EarlyExit.load(runs[0] / "early_exit.json") == criteria[0]


def test_runs_of_different_recipes(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", CONFIG),
        make_run(tmp_path / "b", replace(CONFIG, weight_decay=0.1)),
    ]
    result = run_here(SCRIPT, *runs)
    assert result.returncode == 2
    assert "differ in nothing but the seed" in result.stderr
    assert result.stderr.count("\n") == 1


def test_runs_on_other_images_are_sent_elsewhere(tmp_path: Path) -> None:
    result = run_here(SCRIPT, make_run(tmp_path / "a", CONFIG, "pets"))
    assert result.returncode == 2
    assert "`coded-resnext calibrate RUN DATA` is for any run" in result.stderr
