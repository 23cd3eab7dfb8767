"""Checkpoints: what comes back, what is noticed, and what a failure leaves."""

from __future__ import annotations

import os
import pickle
import random
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_training import make_config, train
from torture.checkpoints import flip_bits, kill_while_saving

from coded_resnext.training import engine
from coded_resnext.training.run_folder import load_state, save_state

STATE = {"model": {"w": torch.arange(3)}, "history": [{"epoch": 1, "total": 0.5}]}


def make_states(run: Path, count: int) -> list[Path]:
    return [save_state(run, f"step-{i:03d}", {**STATE, "step": i}) for i in range(count)]


def test_round_trip_keeps_the_last_two_with_their_sums(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    paths = make_states(tmp_path, 4)
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 3
    assert state["history"] == STATE["history"]
    assert torch.equal(state["model"]["w"], torch.arange(3))
    left = {path.name for path in paths[0].parent.iterdir()}
    assert left == {f"step-{i:03d}.pt{end}" for i in (2, 3) for end in ("", ".sha256")}
    # The format of sha256sum.
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "step-003.pt.sha256"],
        cwd=paths[0].parent,
        check=True,
    )


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    path = make_states(tmp_path, 1)[0]
    written = path.stat().st_mtime_ns
    make_states(tmp_path, 1)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-1])
    make_states(tmp_path, 1)
    assert (load_state(tmp_path) or {})["step"] == 0


@pytest.mark.parametrize("damage", ["content", "sum", "no sum", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = make_states(tmp_path, 3)[-1]
    beside = last.with_name(last.name + ".sha256")
    if damage == "content":
        last.write_bytes(last.read_bytes()[:-1] + b"x")
    elif damage == "sum":
        beside.write_bytes(b"\xff" + beside.read_bytes()[1:])
    elif damage == "no sum":
        beside.unlink()
    else:
        last.write_bytes(b"")
    assert (load_state(tmp_path) or {})["step"] == 1
    assert f"{last}: damaged checkpoint" in capsys.readouterr().err
    # Out of the way of the next ones, and there for who wants to look at it.
    assert last.with_suffix(".damaged").exists()
    save_state(tmp_path, "step-002", {"step": 2})
    assert (load_state(tmp_path) or {})["step"] == 2
    assert last.with_suffix(".damaged").exists()


def test_no_readable_checkpoint_is_not_a_fresh_start(tmp_path: Path) -> None:
    for path in make_states(tmp_path, 2):
        path.write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint is readable; begin a new run"):
            load_state(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, "step-1", {"state_version": 7})
    with pytest.raises(ValueError, match="state_version: expected 1, got 7"):
        load_state(tmp_path)


class Malicious:
    """Unpickling this would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dump(_: Any, file: Any) -> None:
        file.write(pickle.dumps(Malicious(tmp_path / "made"), protocol=2))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dump)
        save_state(tmp_path, "step-1", {})
    with pytest.raises(ValueError, match="no checkpoint is readable"):
        load_state(tmp_path)
    assert not (tmp_path / "made").exists()


def test_full_disk_is_an_error_that_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files fails in the write itself, as a full disk does."""
    make_states(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*older files are intact.*step-9"):
            save_state(tmp_path, "step-9", {"w": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (load_state(tmp_path) or {})["step"] == 0
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_room_for_checkpoints_is_looked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """so-vits-svc#46, LlamaFactory#1223: an epoch was trained, and could not be saved."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(engine, "TrainStep", lambda *_: pytest.fail("too late"))
    with pytest.raises(OSError, match="MiB of free space, got 0"):
        train(tmp_path, make_config(epochs=1, warmup_epochs=0))


def test_killed_while_saving_short(tmp_path: Path) -> None:
    """The long version is `make torture`."""
    found = kill_while_saving(tmp_path, kills=10, seed=0)
    assert found.resumable == found.tried == 10
    assert found.steps >= 10


def test_flipped_bits_short(tmp_path: Path) -> None:
    """The long version is `make torture`."""
    assert flip_bits(tmp_path, flips=20, generator=random.Random(0)) == 20  # noqa: S311
