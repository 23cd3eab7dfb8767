"""One training a folder: who is refused, who is not, and what others may do meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import make_model
from torture.checkpoints import _save_for_ever

from coded_resnext.interpret.report import gather
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.training.processes import World
from coded_resnext.training.run_folder import LOCK_FILE, RunFolder, load_state, lock_folder

TRAIN = """
import sys
from pathlib import Path
from support.tiny_training import IMAGES, TARGETS, make_config, make_loader, make_model
from coded_resnext.data.batches import batches
from coded_resnext.training.engine import fit
from coded_resnext.training.run_folder import RunFolder
config = make_config(epochs=10_000, warmup_epochs=0)
run = RunFolder(Path(sys.argv[1]), config.to_dict())
fit(make_model(), make_loader(config), batches(IMAGES, TARGETS), config, run)
"""
HOLD = """
import sys, time
from pathlib import Path
from coded_resnext.training.run_folder import lock_folder
lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in the folder."""
    command = [sys.executable, "-P", "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_training_is_refused_until_the_first_has_ended(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    for resume in (False, True):
        with pytest.raises(ValueError, match=rf"another training \(process {holder.pid} on .*wait"):
            RunFolder(tmp_path, {}, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE}
    # Killed, it lets go, though its file stays.
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    RunFolder(tmp_path, {})


def test_the_process_itself_may_open_its_folder_again(tmp_path: Path) -> None:
    RunFolder(tmp_path, {})
    RunFolder(tmp_path, {}, resume=True)
    child = os.fork()
    if child == 0:
        # A fork has what the process knows, and not its locks.
        try:
            lock_folder(tmp_path)
        except ValueError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_another_folder_in_the_place_of_one_is_locked_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder(folder, {})
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    RunFolder(folder, {})
    command = [sys.executable, "-P", "-c", HOLD, str(folder)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert f"process {os.getpid()}" in refused.stderr


def test_the_first_process_of_a_run_alone_locks(tmp_path: Path) -> None:
    """Of two under torchrun, the second leaves the folder to the first."""

    class Second(World):
        def on_main(self, function: Callable[[], Any]) -> Any:
            return None

    RunFolder(tmp_path, {}, world=Second(rank=1, size=2))
    assert not (tmp_path / LOCK_FILE).exists()
    RunFolder(tmp_path, {}, world=World())
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.long
def test_readers_while_a_training_writes(tmp_path: Path) -> None:
    """Reports and model files in the middle of a run: whole, of one epoch or of a later one."""
    child = subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path)])
    seen: set[int] = set()
    end = time.monotonic() + 60
    try:
        while len(seen) < 5 and time.monotonic() < end:
            if not (tmp_path / "metrics.csv").exists():
                continue
            before = load_model(tmp_path).training["epochs_done"]
            content = gather(tmp_path)
            after = load_model(tmp_path).training["epochs_done"]
            assert not [e for e in content["missing"] if "cannot be read" in e["why"]]
            # The log is written behind the model of its epoch.
            assert before - 1 <= len(content["training_log"]["epoch"]) <= after
            seen.add(before)
    finally:
        child.kill()
        child.wait()
    assert len(seen) == 5


def test_a_reader_during_checkpoints(tmp_path: Path) -> None:
    """A state is read while the next ones are written, and those before are removed."""
    (tmp_path / "checkpoints").mkdir()
    ready, says = os.pipe()
    child = os.fork()
    if child == 0:
        _save_for_ever(tmp_path, 0, says)
    os.read(ready, 1)
    steps = []
    end = time.monotonic() + 2
    try:
        while time.monotonic() < end:
            state = load_state(tmp_path)
            assert state is not None
            assert bool((state["weights"] == state["step"]).all())
            steps.append(state["step"])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert steps == sorted(steps)
    assert not list((tmp_path / "checkpoints").glob("*.damaged"))


def test_readers_of_a_model_file_that_is_replaced(tmp_path: Path) -> None:
    """The tensors of a file are those of the time at which it was opened."""
    path = tmp_path / "model.safetensors"
    model = make_model()
    save_model(path, model)
    loaded = load_model(path).model
    before = loaded.head.weight.clone()
    with torch.no_grad():
        model.head.weight += 1
    save_model(path, model)
    assert torch.equal(loaded.head.weight, before)
