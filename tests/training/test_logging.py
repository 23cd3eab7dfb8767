"""Where the numbers go: what a log gets, what a missing library means."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_training import IMAGES, TARGETS, make_config, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coded_resnext.data.batches import Batch, TrainingBatches
from coded_resnext.data.loaders import measure_input
from coded_resnext.models.checkpoint import load_model
from coded_resnext.training.logging import RunLog


class FakeWandb:
    """What the engine uses of Weights & Biases."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.starts.append(arguments)

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(
            id=arguments["id"] or "abc",
            log=lambda values, step: self.rows.append((step, values)),
            finish=finish,
        )


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make a library look as if it were not installed."""
    real = builtins.__import__

    def importing(module: str, *arguments: Any, **more: Any) -> Any:
        if module == name or module.startswith(f"{name}."):
            raise ImportError(name)
        return real(module, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_tensorboard_has_steps_and_epochs_by_step(tmp_path: Path) -> None:
    _, history = train(tmp_path, make_config(epochs=2, log_interval=2))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    epochs = events.Scalars("epoch/test_accuracy")
    assert [event.step for event in epochs] == [3, 6]
    assert [e.value for e in epochs] == pytest.approx([r["test_accuracy"] for r in history])
    assert [event.step for event in events.Scalars("step/coding_1")] == [2, 4, 6]
    assert "step/lr" in events.Tags()["scalars"]


def test_without_tensorboard_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "torch.utils.tensorboard")
    train(tmp_path, make_config(epochs=1, warmup_epochs=0))
    assert "TensorBoard is not installed" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").exists()


def test_wandb_gets_the_rows_and_goes_on_in_the_same_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(epochs=1, warmup_epochs=0, log_wandb=True, log_interval=2)
    _, history = train(tmp_path, config)
    train(tmp_path, config, resume=True)
    assert [start["id"] for start in fake.starts] == [None, "abc"]
    assert fake.starts[0]["config"]["epochs"] == 1
    assert fake.starts[0]["name"] == tmp_path.name
    assert [step for step, _ in fake.rows] == [2, 3]
    assert fake.rows[1][1]["epoch/test_accuracy"] == history[0]["test_accuracy"]
    assert fake.finished == 2


def test_wandb_that_is_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "wandb")
    with pytest.raises(ImportError, match=r"log_wandb: .* not installed: pip install wandb"):
        RunLog(tmp_path, {}, wandb=True, step=0, steps=1)


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(None, {}, wandb=True, step=0, steps=1)
    log.advance()
    log.epoch("epoch 1/1", {"a": 1.0}, 1)
    log.close()
    said = capsys.readouterr()
    assert not said.err
    assert not said.out


def test_the_start_of_a_run_says_what_its_limit_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, after the steps in which compilers are at work; a resumed run says it again."""
    for rate, limit in ((1.0, "input"), (1e9, "network")):
        folder = tmp_path / limit
        train(folder, make_config(epochs=8), input_rate=rate)
        said = capsys.readouterr().err
        assert said.count("images/s, network") == 1
        assert f"input {rate:,.0f} images/s, network " in said
        assert f": the {limit} is the limit" in said
    # Waiting for a step changes nothing about it.
    other, _ = train(tmp_path / "silent", make_config(epochs=8))
    assert "images/s, network" not in capsys.readouterr().err
    same = load_model(tmp_path / "input").model.state_dict()
    assert all(torch.equal(same[name], value) for name, value in other.state_dict().items())


def test_the_input_alone_is_measured() -> None:
    class Slow(TrainingBatches):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    loader = Slow(IMAGES.repeat(20, 1, 1, 1), TARGETS.repeat(20), 8, seed=0)
    # Eight images in at least a fiftieth of a second; and in no more than ten of them.
    assert 40 < measure_input(loader, 0, seconds=0.3) <= 8 / 0.02
