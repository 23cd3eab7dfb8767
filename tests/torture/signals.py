"""Training processes that get SIGTERM at random moments, forked or under torchrun.

torchrun --standalone --nproc-per-node=2 tests/torture/signals.py FOLDER
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# An optimizer and the log import these when they are made: here, once, and not in every fork.
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
from support.tiny_training import IMAGES, TARGETS, WorkerLoader, make_config, make_model
from torch import Tensor

from coded_resnext.data.batches import Batch, Batches
from coded_resnext.models.checkpoint import load_model
from coded_resnext.training.engine import fit
from coded_resnext.training.processes import run_script, training_session
from coded_resnext.training.run_folder import RunFolder, load_state

CONFIG = make_config(epochs=5, batch_size=4, model_ema=True)
STEPS_PER_EPOCH = 6
STEPS = 30
# A process that has not ended by then has failed; the promise is ten seconds.
PATIENCE = 30.0


@dataclass
class Terminations:
    """What became of runs that were told to stop."""

    tried: int = 0
    clean: int = 0
    """Ended with status 143 (forked), or all processes of torchrun did."""
    current: int = 0
    """The checkpoint is of the last step that was begun."""
    same_bits: int = 0
    """Resumed, the run ended with the weights of one that was never stopped."""
    within_epoch: int = 0
    slowest: float = 0.0
    """Seconds from the signal to the end of the last process."""


class Counting:
    """Passes a training loader on and notes in a file which step has been begun."""

    def __init__(self, path: Path, rank: int, size: int, workers: int) -> None:
        self.loader = WorkerLoader(CONFIG, workers, rank=rank, world_size=size)
        self.describe = self.loader.describe
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.begun = (epoch - 1) * len(self) + start_step
        self.loader.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.begun += 1
            os.pwrite(self.file, f"{self.begun:9d}".encode(), 0)
            yield batch


def train(folder: Path, workers: int = 0) -> None:
    """A run, on its own or as one of the processes that the environment speaks of."""
    with training_session("cpu") as world:
        run = RunFolder(folder, CONFIG.to_dict(), resume=True, world=world)
        evaluated: tuple[Tensor, Tensor] = (IMAGES, TARGETS)
        fit(
            make_model(),
            Counting(folder / f"begun-{world.rank}", world.rank, world.size, workers),
            Batches(*evaluated, 4, rank=world.rank, world_size=world.size),
            CONFIG,
            run,
            world=world,
        )


def fork(folder: Path, processes: int, workers: int = 0) -> list[int]:
    """Start a run in forked processes, each the head of a process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                sys.stderr = (folder.parent / f"{folder.name}-{rank}.log").open("a")
                status = run_script("torture", lambda: train(folder, workers))
                sys.stderr.close()
            finally:
                os._exit(status)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    """Their exit statuses; who does not end in time is killed and counts as -9."""
    deadline = time.monotonic() + PATIENCE
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child in statuses:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[child] for child in children]


def terminate_forked(
    folder: Path, *, times: int, processes: int, seed: int, workers: int = 0
) -> Terminations:
    """SIGTERM at random moments, to one process of the run, which is left to tell the others.

    With loader workers it goes to them too: to the whole group, as batch systems and torchrun do.
    """
    draw = random.Random(seed)  # noqa: S311
    folder.mkdir(parents=True, exist_ok=True)
    assert wait(fork(folder / "whole", processes, workers)) == [0] * processes
    outcome = Terminations()
    for index in range(times):
        run = folder / f"run-{index}"
        children = fork(run, processes, workers)
        _wait_for_random_moment(run, processes, draw)
        sent = time.monotonic()
        send = os.killpg if workers else os.kill
        send(draw.choice(children), signal.SIGTERM)
        statuses = wait(children)
        outcome.slowest = max(outcome.slowest, time.monotonic() - sent)
        outcome.clean += statuses == [143] * processes
        if statuses != [143] * processes:
            print(f"{run}: exit statuses {statuses}", file=sys.stderr)
        _look(outcome, run, processes)
        if wait(fork(run, processes, workers)) == [0] * processes:
            outcome.same_bits += same_weights(run, folder / "whole")
    return outcome


def terminate_torchrun(folder: Path, *, times: int, processes: int, seed: int) -> Terminations:
    """SIGTERM at random moments, to torchrun, which passes it on to its processes."""
    draw = random.Random(seed)  # noqa: S311
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__]
    folder.mkdir(parents=True, exist_ok=True)
    whole = [*command, str(folder / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    outcome = Terminations()
    for index in range(times):
        run = folder / f"run-{index}"
        child = subprocess.Popen([*command, str(run)], stderr=subprocess.PIPE, text=True)
        _wait_for_random_moment(run, processes, draw)
        sent = time.monotonic()
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=PATIENCE)
        outcome.slowest = max(outcome.slowest, time.monotonic() - sent)
        # torchrun has a code of its own; the main process says how it ended.
        clean = child.returncode != 0 and "--resume finishes the run" in said
        outcome.clean += clean
        if not clean:
            print(f"{run}: exit status {child.returncode}: {said}", file=sys.stderr)
        _look(outcome, run, processes)
        resumed = subprocess.run([*command, str(run)], check=False, capture_output=True)
        outcome.same_bits += resumed.returncode == 0 and same_weights(run, folder / "whole")
    return outcome


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs have ended with the same weights, bit for bit."""
    first, second = (load_model(folder).model.state_dict() for folder in (a, b))
    return all(bool((first[name] == second[name]).all()) for name in first)


def _look(outcome: Terminations, run: Path, processes: int) -> None:
    begun = {int((run / f"begun-{rank}").read_text() or 0) for rank in range(processes)}
    state = load_state(run) or {"step": -1}
    outcome.tried += 1
    outcome.current += begun == {state["step"]}
    outcome.within_epoch += state["step"] % STEPS_PER_EPOCH != 0


def _wait_for_random_moment(run: Path, processes: int, draw: random.Random) -> None:
    """Until a random step is under way, or a moment longer: its evaluation or checkpoint, say.

    Some steps before the last, so that there is a run left to stop.
    """
    notes = [run / f"begun-{rank}" for rank in range(processes)]
    target = draw.randrange(STEPS - 3)
    while not all(note.exists() and int(note.read_text() or 0) >= target for note in notes):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.03))


if __name__ == "__main__":
    sys.exit(run_script("torture_signals.py", lambda: train(Path(sys.argv[1]))))
