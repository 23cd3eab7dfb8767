"""Two processes under torchrun against one; what the processes agree on, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import class_margins
from support.tiny_training import BOOK, assert_same, make_config, make_loader, make_model, train
from support.two_processes import evaluation_data, gradients

from coded_resnext.data.batches import batches
from coded_resnext.models.checkpoint import load_model
from coded_resnext.training.engine import fit, measure_accuracy
from coded_resnext.training.processes import TrainingStopped, World, run_script, training_session
from coded_resnext.training.run_folder import RunFolder, load_state

SCRIPT = Path(__file__).parents[1] / "support" / "two_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of the processes found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.long
def test_gradients_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    alone = gradients(World())
    largest = max(float(gradient.abs().max()) for gradient in alone)
    assert largest > 0.01
    for shared in found:
        for a, b in zip(alone, shared["gradients"], strict=True):
            assert a.dtype == torch.float64
            assert float((a - b).abs().max()) <= 1e-12


@pytest.mark.long
def test_evaluation_counts_each_sample_once(found: list[dict[str, Any]]) -> None:
    model, (images, targets) = make_model(), evaluation_data()
    accuracy = measure_accuracy(model, batches(images, targets))
    # Batches are rounded by their size; no decision may hang on that.
    logits, (energies,) = model.eval()(images, return_energies=True)
    assert float(class_margins(logits).min()) > 1e-6
    assert float(class_margins(energies @ BOOK.codewords.float().T).min()) > 1e-6
    assert accuracy.samples == 37
    for shared in found:
        assert shared["accuracy"] == [37, accuracy.final, list(accuracy.early)]


@pytest.mark.long
def test_parameters_are_equal_to_the_bit_after_fifty_steps(found: list[dict[str, Any]]) -> None:
    first, second = (shared["fifty"] for shared in found)
    # Both take the same sums of gradients through the same instructions.
    for name, _ in make_model().named_parameters():
        assert torch.equal(first["model"][name], second["model"][name]), name
        assert torch.equal(first["average"][name], second["average"][name]), name
    assert_same(first["model"], second["model"])
    assert_same(first["average"], second["average"])


@pytest.mark.long
def test_running_statistics_become_the_mean(found: list[dict[str, Any]]) -> None:
    first, second = (shared["fifty"] for shared in found)
    names = [name for name in first["apart"] if "running" in name]
    assert names
    for name in names:
        a, b = first["apart"][name], second["apart"][name]
        assert not torch.equal(a, b)
        assert torch.allclose(first["model"][name], (a + b) / 2, rtol=1e-6)


@pytest.mark.long
def test_a_signal_to_one_process_stops_both_after_the_same_step(
    found: list[dict[str, Any]],
) -> None:
    first, second = (shared["stopped"] for shared in found)
    assert "TrainingStopped: stopped" in first["error"]
    assert "holds the state after step 6" in first["error"]
    assert first["error"] == second["error"]


@pytest.mark.long
def test_resumed_processes_give_the_same_bits(found: list[dict[str, Any]], folder: Path) -> None:
    """Also of what differs between them: their running statistics within an epoch."""
    for shared in found:
        assert_same(shared["whole"]["model"], shared["resumed"]["model"])
        assert shared["whole"]["history"] == shared["resumed"]["history"]
    assert_same(found[0]["whole"]["model"], found[1]["whole"]["model"])
    whole, cut = (load_state(folder / name) or {} for name in ("whole", "cut"))
    for name in ("model", "average"):
        assert_same(whole[name], cut[name])
    assert_same(whole["optimizer"]["state"], cut["optimizer"]["state"])
    assert_same(dict(load_model(folder / "whole").model.state_dict()), found[0]["whole"]["model"])


@pytest.mark.long
def test_numbers_that_are_not_finite_on_one_process_stop_both(found: list[dict[str, Any]]) -> None:
    first, second = (shared["spoiled"]["error"] for shared in found)
    assert first == second
    assert "step 4 (epoch 2) is not finite: first the coding loss of coded block 1" in first
    # The images are those of the process where it came up.
    loader = make_loader(make_config(), rank=1, world_size=2)
    loader.set_epoch(2, 1)
    images = loader.describe(next(iter(loader)).indices)
    assert f"its images: {', '.join(images)} (" in first
    parameters = [name for name, _ in make_model().named_parameters()]
    for name in parameters:
        a, b = (shared["spoiled"]["model"][name] for shared in found)
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.long
def test_errors_of_the_main_process_reach_the_other(found: list[dict[str, Any]]) -> None:
    for shared in found:
        assert "ValueError: out: " in shared["refused"]["error"]
        assert "OSError: [Errno 28] No space left on device" in shared["full"]["error"]


@pytest.mark.long
def test_a_run_goes_on_with_fewer_processes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "spoiled"
    config = make_config(model_ema=True, model_ema_decay=0.9)
    # Its two processes were tested on other images.
    _, history = train(source, config, resume=True, other_images=True)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert "was on 2 processes and goes on with 1: as good, but not the same" in (
        capsys.readouterr().err
    )


def test_processes_must_divide_the_batch(tmp_path: Path) -> None:
    config = make_config()
    run = RunFolder(tmp_path, config.to_dict())
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of 3 .* choose 6 or 9"):
        fit(make_model(), make_loader(config), [], config, run, world=World(size=3))


def test_devices() -> None:
    with training_session("cpu") as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        assert world.is_main
        assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match=r"device: expected a device .* got 'gpu'"):
        training_session("gpu").__enter__()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that is here, got cuda"):
            training_session("cuda").__enter__()


def test_exit_statuses_of_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Any:
        def body() -> None:
            raise error

        return body

    assert run_script("x.py", lambda: None) == 0
    assert run_script("x.py", fail(TrainingStopped(15, "stopped: y"))) == 143
    assert run_script("x.py", fail(ValueError("lr: z"))) == 2
    assert run_script("x.py", fail(OSError(28, "full", "file"))) == 2
    assert run_script("x.py", fail(FloatingPointError("step 3"))) == 1
    assert run_script("x.py", fail(KeyboardInterrupt())) == 130
    said = capsys.readouterr().err
    assert "stopped: y\n" in said
    assert "x.py: lr: z\n" in said
    assert "x.py: step 3\n" in said


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_rank_that_is_no_number_is_one_sentence(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "x")

    def body() -> None:
        with training_session("cpu"):
            raise AssertionError

    assert run_script("train.py", body) == 2
    said = capsys.readouterr().err
    assert said == f"train.py: {variable}: expected a number in the environment, got 'x'\n"
