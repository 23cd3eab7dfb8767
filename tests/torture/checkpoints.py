"""Processes killed while they save, and bits flipped in what they saved.

The tests run a few of each, `make torture` many. Children are forked, so that each begins within
milliseconds with everything imported.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from coded_resnext.training.run_folder import load_state, save_state

# A few milliseconds of writing, so that many kills fall into it.
NUMBERS = 1_000_000


@dataclass
class Kills:
    """What became of processes that were killed."""

    tried: int = 0
    resumable: int = 0
    steps: int = 0
    """Checkpoints that the processes finished, all together."""
    unfinished: int = 0
    """Kills that left a temporary file: they fell into the writing itself."""


def kill_while_saving(run: Path, *, kills: int, seed: int) -> Kills:
    """Kill so many processes, one after the other, each of which goes on where the last one was.

    A run is resumable when its checkpoint is whole and newer than what the process before had
    reached: each has saved once before it is killed in the middle of a later time.
    """
    draw = random.Random(seed)  # noqa: S311
    outcome = Kills()
    save_state(run, _name(0), _state(0))
    for _ in range(kills):
        begun = (load_state(run) or {})["step"]
        ready, says = os.pipe()
        child = os.fork()
        if child == 0:
            _save_for_ever(run, begun, says)
        os.close(says)
        os.read(ready, 1)
        os.close(ready)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcome.unfinished += any((run / "checkpoints").glob(".*.tmp"))
        state = load_state(run)
        outcome.tried += 1
        if state is not None and state["step"] > begun and _is_right(state):
            outcome.resumable += 1
            outcome.steps += state["step"] - begun
    return outcome


def flip_bits(run: Path, *, flips: int, generator: random.Random) -> int:
    """Flip single bits in the last of two checkpoints; how often this was noticed."""
    noticed = 0
    for _ in range(flips):
        for step in (1, 2):
            path = save_state(run, _name(step), _state(step))
        content = bytearray(path.read_bytes())
        place = generator.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        said = StringIO()
        with redirect_stderr(said):
            state = load_state(run)
        named = str(path) in said.getvalue()
        noticed += bool(named and state is not None and state["step"] == 1 and _is_right(state))
    return noticed


def _save_for_ever(run: Path, step: int, says: int) -> None:
    """In the child: never returns. It says when it has saved once and goes on."""
    try:
        while True:
            step += 1
            save_state(run, _name(step), _state(step))
            os.write(says, b"!")
    finally:
        os._exit(1)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _state(step: int) -> dict[str, object]:
    return {"step": step, "weights": torch.full((NUMBERS,), float(step))}


def _is_right(state: dict[str, object]) -> bool:
    weights = state["weights"]
    assert isinstance(weights, torch.Tensor)
    return bool((weights == state["step"]).all())
