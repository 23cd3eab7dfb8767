"""Stopped anywhere and resumed, a run gives the bits of one that was never stopped."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import (
    IMAGES,
    TARGETS,
    WorkerLoader,
    assert_same,
    make_config,
    make_model,
    without_cost,
)

from coded_resnext.data.batches import Batch, TrainingBatches, batches
from coded_resnext.training.engine import fit
from coded_resnext.training.processes import TrainingStopped
from coded_resnext.training.run_folder import RunFolder, load_state

STEPS = 12
STOPS = random.Random(0).sample(range(STEPS), 10)  # noqa: S311


class Stopping:
    """Passes a loader on and sends a signal before a step of the run."""

    def __init__(self, loader: WorkerLoader | TrainingBatches, step: int) -> None:
        self.loader, self.step = loader, step
        self.describe = loader.describe

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.next = (epoch - 1) * len(self) + start_step
        self.loader.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if self.next == self.step:
                signal.raise_signal(signal.SIGTERM)
            self.next += 1
            yield batch


def run(
    folder: Path, workers: int, *, stop: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """Everything that a run leaves, as the checkpoint has it."""
    config = make_config(
        model_ema=True, model_ema_decay=0.9, mixup=0.2, clip_grad=1.0, grad_accum_steps=2
    )
    loader = WorkerLoader(config, workers)
    given = loader if stop is None else Stopping(loader, stop)
    folder_of_run = RunFolder(folder, config.to_dict(), resume=resume)
    fit(make_model(), given, batches(IMAGES, TARGETS), config, folder_of_run)
    state = load_state(folder) or {}
    for row in (state, *state["processes"]):
        row.pop("seconds", None)
    state["history"] = without_cost(state["history"])
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing stops, without workers."""
    return run(tmp_path_factory.mktemp("whole"), 0)


@pytest.mark.parametrize(
    ("workers", "stops"),
    [
        (0, STOPS[:3]),
        pytest.param(0, STOPS[3:], marks=pytest.mark.long),
        pytest.param(2, STOPS, marks=pytest.mark.long),
    ],
)
def test_stopped_at_random_steps(
    tmp_path: Path, whole: dict[str, Any], workers: int, stops: list[int]
) -> None:
    """Ten steps for each number of workers: twenty runs, most stopped within an epoch."""
    assert any((stop + 2) % 3 for stop in stops)
    for stop in stops:
        folder = tmp_path / str(stop)
        try:
            run(folder, workers, stop=stop)
        except TrainingStopped:
            # The signal is agreed on one step late, and that step is finished.
            assert (load_state(folder) or {})["step"] == min(stop + 2, 3 * (stop // 3 + 1))
        else:
            raise AssertionError("the signal was not noticed")
        resumed = run(folder, workers, resume=True)
        assert_same(resumed, whole)


def test_random_generators_come_back(tmp_path: Path) -> None:
    """The engine seeds PyTorch's itself; a loader may use the others."""
    import numpy as np

    from coded_resnext.training.run_folder import get_rng_state, set_rng_state

    def draw() -> list[float]:
        return [
            random.random(),  # noqa: S311
            np.random.rand(),  # noqa: NPY002
            np.random.randn(),  # noqa: NPY002
            torch.rand(()).item(),
        ]

    draw()
    state = get_rng_state()
    torch.save(state, tmp_path / "state")
    first = draw()
    assert draw() != first
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first
