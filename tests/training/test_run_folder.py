"""The folder of a run: what differs between two runs, and what a killed process has left."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from coded_resnext.files import write_atomically
from coded_resnext.training import run_folder
from coded_resnext.training.run_folder import RunFolder, differences

CONFIG = {"data": "digits", "network": {"stages": [{"depth": 1}, {"depth": 2}]}, "seed": 0}


def test_differences_are_named_by_their_place() -> None:
    changed = {"data": "digits", "network": {"stages": [{"depth": 1}, {"depth": 3}]}, "lr": 0.1}
    assert differences(CONFIG, changed) == [
        "network.stages.1.depth was 2, is 3",
        "seed was 0, is None",
        "lr was None, is 0.1",
    ]
    assert differences(CONFIG, dict(CONFIG)) == []
    assert differences([1, 2], [1, 2, 3]) == ["was [1, 2], is [1, 2, 3]"]
    assert differences({"a": {"x": 1}}, {"a": {"x": 2}}, ignore=("x",)) == []
    assert len(differences({"a": "b" * 1000}, {"a": "c" * 1000})[0]) < 150


def test_what_changes_no_result_may_change(tmp_path: Path) -> None:
    settings = {"lr": 0.1, "recovery_interval": 0, "log_interval": 50}
    RunFolder(tmp_path, {"training": settings}).save_state("step-1", {})
    RunFolder(tmp_path, {"training": {**settings, "recovery_interval": 9}}, resume=True)
    with pytest.raises(ValueError, match=r"another kind: training.lr was 0.1, is 0.2"):
        RunFolder(tmp_path, {"training": {**settings, "lr": 0.2}}, resume=True)


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG)
    (tmp_path / ".model.safetensors.123.tmp").write_bytes(b"half")
    RunFolder(tmp_path, CONFIG, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", ".lock"}


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run"):
        RunFolder(tmp_path / "run", CONFIG)


def test_an_epoch_late_in_a_run_is_logged_as_fast_as_an_early_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log was written whole after every epoch, 2.7 MiB at the 10,000th."""
    written = []
    monkeypatch.setattr(
        run_folder,
        "write_atomically",
        lambda path, content: (written.append(path.name), write_atomically(path, content)),
    )
    run = RunFolder(tmp_path, {})
    history = [{"epoch": float(epoch), "lr": 0.1 / epoch} for epoch in range(1, 9)]
    for epochs in range(1, 9):
        run.write_metrics(history[:epochs])
    assert written.count("metrics.csv") == 1
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == history
    # A resumed run, and one with another column, write it anew.
    RunFolder(tmp_path, {}, resume=True).write_metrics(history[:3])
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    run.write_metrics([*history, {"epoch": 9.0, "lr": 0.0, "dead_branches": 1.0}])
    assert (tmp_path / "metrics.csv").read_text().startswith("epoch,lr,dead_branches\n")


def test_a_checkpoint_encodes_the_new_rows_of_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows were encoded after every epoch, 0.3 s at the 10,000th, and read in 2 s."""
    history = [{"epoch": epoch, "lr": 0.1 / (epoch + 1)} for epoch in range(1001)]
    run, encoded = RunFolder(tmp_path, {}), []
    run.save_state("step-1", {"history": history[:1000]})
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda row: (encoded.append(row), dumps(row))[1])
    run.save_state("step-2", {"history": history})
    assert encoded == history[1000:]
    state = run.load_state()
    assert state is not None
    assert state["history"] == history
