"""The main job, short: the digits trained by the script, interrupted, resumed, evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import Pages, chromium
from support.script_runs import run_here

from coded_resnext.cli import main
from coded_resnext.data.datasets import load_digits_split
from coded_resnext.models.checkpoint import load_model

SCRIPT = Path(__file__).parents[2] / "train" / "digits.py"
KEYS = {
    "test_accuracy",
    "early_decoding",
    "single_class_average_precision",
    "remove_active_accuracy",
    "remove_inactive_accuracy",
    "parameters",
    "seconds",
    "versions",
    "seed",
    "command",
}


def digits(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short coded run."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    result = digits("--out", str(folder), "--epochs", "8", "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert f"summary: {folder / 'summary.json'}" in result.stdout
    assert f"report: {folder / 'report.html'}" in result.stdout
    for picture in (folder / "figures").glob("*.png"):
        assert f"picture: {picture}" in result.stdout
    return folder


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    """What the run found."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


@pytest.mark.long
def test_it_learns_and_its_branches_specialise(summary: dict[str, Any]) -> None:
    """Eight epochs of a full run's many; thresholds are below what five seeds gave."""
    assert summary["test_accuracy"] > 0.95
    assert min(summary["early_decoding"]) > 0.85
    assert sum(summary["single_class_average_precision"]) / 10 > 0.85
    # Without the branches that work for a sample's class, a block harms; without the others, not.
    assert min(summary["remove_active_accuracy"]) < summary["test_accuracy"] - 0.02
    assert min(summary["remove_inactive_accuracy"]) > summary["test_accuracy"] - 0.01


@pytest.mark.long
def test_summary_is_complete(summary: dict[str, Any]) -> None:
    assert summary.keys() >= KEYS
    assert summary["seed"] == 1
    assert len(summary["single_class_average_precision"]) == 10
    blocks = len(summary["early_decoding"])
    assert blocks == len(summary["remove_active_accuracy"]) == 4
    assert "--seed 1" in summary["command"]


@pytest.mark.long
def test_summary_is_what_the_saved_model_does(run: Path, summary: dict[str, Any]) -> None:
    loaded = load_model(run)
    split = load_digits_split()
    stored = json.loads((run / "split.json").read_text())
    assert stored["test"] == split.test_indices.tolist()
    assert loaded.preprocessing == split.preprocessing
    assert sum(p.numel() for p in loaded.model.parameters()) == summary["parameters"]
    with torch.inference_mode():
        predicted = loaded.model(split.test_images).argmax(1)
    correct = float((predicted == split.test_targets).double().mean())
    assert correct == pytest.approx(summary["test_accuracy"])


@pytest.mark.long
def test_eval_repeats_the_evaluation(
    run: Path, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["eval", str(run), "digits", "--json"]) == 0
    repeated = json.loads(capsys.readouterr().out)
    text = json.dumps(repeated)
    assert json.dumps(summary["test_accuracy"]) in text
    assert json.dumps(summary["remove_active_accuracy"][0]) in text


@pytest.mark.long
def test_pictures_and_logs_are_there(run: Path) -> None:
    pictures = list((run / "figures").glob("*.png"))
    assert len(pictures) >= 5
    assert {p.stem for p in pictures} == {p.stem for p in (run / "figures").glob("*.svg")}
    assert (run / "metrics.csv").read_text().count("\n") == 9
    assert list((run / "tensorboard").glob("events*"))


@pytest.mark.long
def test_it_ends_with_a_report_to_look_at(run: Path, summary: dict[str, Any]) -> None:
    samples = json.loads((run / "evaluation.json").read_text())["samples"]
    with chromium() as browser:
        pages = Pages(browser)
        page = pages.open(run / "report.html")
        accuracy = f"{100 * summary['test_accuracy']:.2f} %"
        assert page.inner_text("#overview .figure >> nth=0") == accuracy
        assert page.locator("#missing").count() == 0
        page.select_option("#class-select", "3")
        first = samples["targets"].index(3)
        page.locator(f'input[name="shown"][value="{first}"]').check(force=True)
        said = page.locator("#decoders td:nth-child(2) .name").all_inner_texts()
        assert said == [str(block["decoded"][first]) for block in samples["blocks"]]
        split = load_digits_split()
        assert int(split.test_targets[samples["positions"][first]]) == 3
        assert pages.complaints == []


@pytest.mark.long
def test_plain_twin_has_no_coded_blocks(tmp_path: Path) -> None:
    result = digits("--out", str(tmp_path), "--epochs", "1", "--plain")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["early_decoding"] == []
    assert (
        summary["parameters"] == json.loads((tmp_path / "summary.json").read_text())["parameters"]
    )
    assert load_model(tmp_path).model.codebooks == ()


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_leaves_a_usable_run_that_resume_finishes(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--epochs", "3"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.csv").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume finishes the run" in errors
    assert load_model(tmp_path).training["epochs_done"] >= 1
    assert not (tmp_path / "summary.json").exists()
    assert digits("--out", str(tmp_path), "--epochs", "3").returncode == 2
    result = digits("--out", str(tmp_path), "--epochs", "3", "--resume")
    assert result.returncode == 0, result.stderr
    assert load_model(tmp_path).training["epochs_done"] == 3
    assert (tmp_path / "summary.json").exists()


def test_help_explains_every_option() -> None:
    result = run_here(SCRIPT, "--help")
    assert result.returncode == 0
    for option in ("seed", "epochs", "out", "plain", "coding-weight", "drop-branches", "exponent"):
        assert f"--{option}" in result.stdout
    assert "ablation that concatenates" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "epochs: expected"),
        (("--exponent", "0.5"), "exponent: expected"),
        (("--drop-branches", "1"), "drop_branches: expected"),
    ],
)
def test_bad_options_are_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run_here(SCRIPT, "--out", tmp_path / "run", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"digits.py: {message}")
    assert result.stderr.count("\n") == 1
