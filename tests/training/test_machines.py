"""Two agents of torchrun, each with one process, as on two machines: here over the loop-back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import assert_same

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc for processes"),
]
# A run of four epochs of three steps. Its fifth step may wait, and a file tells that it does.
SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from support.two_processes import train
from coded_resnext.training.processes import run_script, training_session

folder, pause = Path(sys.argv[1]), float(sys.argv[2])

def wait(batch):
    if pause:
        (folder / "begun").touch()
        time.sleep(pause)
    return batch

def body():
    with training_session("cpu", timeout=60) as world:
        outcome = train(folder / "run", world, at=4, event=wait, resume=True)
        torch.save(outcome, folder / f"{world.rank}.pt")

sys.exit(run_script("training", body))
"""


def command(folder: Path, pause: float, *options: str) -> list[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", *options),
        *(str(script), str(folder), str(pause)),
    ]


def start_agents(folder: Path, pause: float = 0.0) -> list[subprocess.Popen[str]]:
    """Two agents that know of each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for number in range(2):
        options = (
            *("--nnodes=2", f"--node-rank={number}"),
            *("--master-addr=127.0.0.1", f"--master-port={port}"),
        )
        agents.append(
            subprocess.Popen(
                command(folder, pause, *options),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return agents


def finish(agents: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The status and the words of agents that end in time."""
    try:
        words = [agent.communicate(timeout=240)[0] for agent in agents]
        return [(agent.returncode, text) for agent, text in zip(agents, words, strict=True)]
    finally:
        for agent in agents:
            if agent.poll() is None:
                end_machine(agent)


def end_machine(agent: subprocess.Popen[str]) -> None:
    """An agent and the process that it has started end at once, without a word."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert children
    for process in (agent.pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes of one agent left."""
    folder = tmp_path_factory.mktemp("one")
    line = command(folder, 0.0, "--standalone")
    line[line.index("--nproc-per-node=1")] = "--nproc-per-node=2"
    result = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return outcomes(folder)


def test_two_machines_train_as_one_with_two_processes(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The same losses and weights, to the bit: the same sums of the same two numbers."""
    for status, words in finish(start_agents(tmp_path)):
        assert status == 0, words
    assert_same(outcomes(tmp_path), whole)


def test_a_machine_that_is_gone_ends_the_other_and_the_run_goes_on(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    agents = start_agents(tmp_path, pause=120.0)
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    # The second waits in its fifth step, and the first for it.
    end_machine(agents[1])
    [(status, words)] = finish(agents[:1])
    agents[1].communicate(timeout=30)
    assert status != 0
    assert "training: another process has ended, or gives no answer" in words
    for status, words in finish(start_agents(tmp_path)):
        assert status == 0, words
    assert_same(outcomes(tmp_path), whole)
