"""train/reproduce.py: the runs it plans, resuming, and the tables it makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.script_runs import run_here

from coded_resnext.interpret.results import load_evaluation

TRAIN = Path(__file__).parents[2] / "train"
# Of the settings that are given twice the last one holds.
TINY = (
    *("--dataset", "synthetic", "--train-images", "60", "--test-images", "30", "--epochs", "2"),
    *("--warmup-epochs", "0", "--batch-size", "20", "--threshold-images", "20"),
    # Images that are made smaller have to be augmented on the CPU.
    *("--img-size", "12", "--augment-on", "cpu"),
)
ROWS = ("--rows", "plain twin", "exponent 2")


@pytest.fixture(scope="module")
def reproduce() -> Any:
    """The script as a module; it imports its neighbours, as Python lets a script."""
    sys.path.insert(0, str(TRAIN))
    try:
        import reproduce as module
    finally:
        sys.path.remove(str(TRAIN))
    return module


def planned(reproduce: ModuleType, *arguments: object) -> Any:
    own, rest = reproduce.parse_arguments([str(argument) for argument in arguments])
    return reproduce.plan(own, rest)


def test_the_published_runs_are_planned_as_published(reproduce: ModuleType, tmp_path: Path) -> None:
    runs = planned(reproduce, "--scale", "full", "--out", tmp_path, "--seeds", 4, 7)
    names = ["base", "plain twin", "exponent 2", "exponent 1"]
    assert [(run.ablation.name, run.seed) for run in runs] == [
        (name, seed) for seed in (4, 7) for name in names
    ]
    for run in runs:
        recipe = run.command.recipe
        assert recipe.training.seed == run.seed
        assert (recipe.training.epochs, recipe.training.batch_size) == (300, 512)
        assert recipe.augmentation.aa == "rand-m4-n3"
        assert (recipe.data.train_images, recipe.data.test_images) == (None, None)
        assert recipe.augmentation.augment_on == "device"
        assert (recipe.training.amp_dtype, recipe.training.torchcompile) == ("bfloat16", "inductor")
        assert run.command.resume
        assert run.command.outside == "rotated"
        assert run.images == 300 * 50_000
    assert [run.command.recipe.training.exponent for run in runs[:4]] == [4, 4, 2, 1]
    short = planned(reproduce, "--scale", "short", "--out", tmp_path)
    assert {run.command.recipe.training.epochs for run in short} == {60}
    assert len({run.command.out for run in runs + short}) == len(runs) + len(short)
    text = reproduce.describe_plan(runs, "cost")
    assert text.count("time not measured") == 8
    assert "120000000 images left to train on" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of one seed, trained by the command."""
    out = tmp_path_factory.mktemp("reproduce")
    result = command(out, "--seeds", 0)
    assert result.returncode == 0, result.stderr
    return out


def command(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, TRAIN / "reproduce.py", "--out", out, *ROWS, *TINY, *arguments]
    return subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)


@pytest.mark.long
def test_every_part_is_there(finished: Path, reproduce: ModuleType) -> None:
    text = (finished / "reproduce.md").read_text()
    evaluation = load_evaluation(finished / "base-0")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    accuracy = f"{100 * evaluation.test_accuracy:.2f}"
    assert f"| base | 94.41 | {accuracy} ± ? |" in text
    assert "| exponent 1 |" not in text
    change = 100 * (
        load_evaluation(finished / "plain-twin-0").test_accuracy - evaluation.test_accuracy
    )
    assert f"| {change:+.2f} ± ? | 0 |" in text
    one = evaluation.one_class
    assert one is not None
    assert evaluation.outside_samples == 30
    for classifier in one.classifiers:
        assert classifier.outside is not None
        assert lines[classifier.class_name] == (
            f"| {classifier.class_name} | {classifier.average_precision:.3f} ± ? "
            f"| {classifier.f1:.3f} ± ? | {classifier.outside.average_precision:.3f} ± ? "
            f"| {100 * classifier.outside.accepted:.1f} ± ? |"
        )
    removal = evaluation.removal
    assert removal is not None
    for number, block in enumerate(removal.blocks, 1):
        points = [removal.accuracy, *block.active.accuracy]
        cells = " | ".join(f"{100 * point:.1f} ± ?" for point in points)
        assert lines[f"{number}, active"].startswith(f"| {number}, active | {cells} |")
    early = evaluation.early_decoding
    assert early is not None
    for number, share in enumerate(early.block_accuracy, 1):
        assert f"| early decoding {number} | {100 * share:.2f} ± ?" in text
    assert (finished / "report.html").read_bytes() == (finished / "base-0/report.html").read_bytes()
    results = json.loads((finished / "reproduce.json").read_text())
    assert results["measures"]["base"]["0"]["accuracy"] == evaluation.test_accuracy
    [summary] = [s for path, s in results["summaries"].items() if path.endswith("base-0")]
    assert f"commit {summary['machine']['commit']}, " in text


@pytest.mark.long
def test_finished_runs_are_not_run_again_and_others_go_on(finished: Path, tmp_path: Path) -> None:
    """A copied folder, as on another machine: one run lacks its evaluation, one is not there."""
    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    weights = (out / "exponent-2-0" / "model.safetensors").read_bytes()
    (out / "base-0" / "summary.json").unlink()
    shutil.rmtree(out / "exponent-2-0")
    stopped = command(out, "--seeds", 0, "--plan")
    assert stopped.stdout.count("; finished\n") == 1
    result = command(out, "--seeds", 0)
    assert result.returncode == 0, result.stderr
    assert "run 1 of 3: base" in result.stderr
    assert "run 2 of 3" not in result.stderr
    assert "run 3 of 3: exponent 2" in result.stderr
    # The first was trained already; only its evaluation was missing.
    for name in ("base-0", "plain-twin-0"):
        path = out / name / "model.safetensors"
        assert path.stat().st_mtime_ns == before[path]
    assert (out / "exponent-2-0" / "model.safetensors").read_bytes() == weights
    again = command(out, "--seeds", 0, "--table")
    assert again.stdout.strip() == (out / "reproduce.md").read_text().strip()


@pytest.mark.long
def test_a_folder_of_other_runs_is_refused(finished: Path) -> None:
    result = command(finished, "--seeds", 0, "--epochs", 3)
    assert result.returncode == 2
    assert "holds a run of another kind: epochs was 2, is 3" in result.stderr


@pytest.mark.long
def test_results_measured_in_another_way_are_refused(finished: Path, tmp_path: Path) -> None:
    """moabb#628: the table named an outside set that was never measured."""
    for flag, value, difference in (
        ("--outside", tmp_path, "outside was 'rotated', is '/"),
        ("--repeats", 3, "repeats was 1, is 3"),
        ("--threshold-images", 50, "threshold_images was 20, is 50"),
    ):
        result = command(finished, "--seeds", 0, "--table", flag, value)
        assert result.returncode == 2
        assert f"base-0 was measured in another way: {difference}" in result.stderr


def test_a_folder_without_runs_has_no_table(tmp_path: Path) -> None:
    result = run_here(TRAIN / "reproduce.py", "--out", tmp_path, "--table")
    assert result.returncode == 2
    assert "holds no finished run of the base" in result.stderr
    result = run_here(TRAIN / "reproduce.py", "--out", tmp_path, "--rows", "no such row")
    assert result.returncode == 2
    assert "rows: expected some of base, plain twin" in result.stderr
