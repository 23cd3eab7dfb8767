"""What two processes do in the tests of distributed training; each check is run by both.

    python tests/support/two_processes.py FOLDER

starts them by torchrun's library and writes what they found into the folder.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.tiny_training import (
    IMAGES,
    TARGETS,
    make_config,
    make_loader,
    make_model,
    without_cost,
)
from torch import Tensor, nn

from coded_resnext.data.batches import Batch, Batches, TrainingBatches
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.engine import fit, measure_accuracy
from coded_resnext.training.processes import TrainingStopped, World, training_session
from coded_resnext.training.run_folder import RunFolder
from coded_resnext.training.step import TrainStep

EVALUATED = 37


def evaluation_data() -> tuple[Tensor, Tensor]:
    """An odd number of samples."""
    images = torch.randn(EVALUATED, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(EVALUATED) % 3


def gradients(world: World) -> list[Tensor]:
    """Of one step in float64 with BatchNorm frozen, in three unequal parts."""
    model = make_model(drop_branches=0.0).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.7)
            module.eval()
    config = make_config(
        batch_size=12, momentum=0.0, weight_decay=0.0, grad_accum_steps=3, lr=1.0, warmup_epochs=0
    )
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainStep(model, config, world, 2)
    chosen = torch.arange(12)[world.rank :: world.size]
    step(Batch(IMAGES[chosen].double(), TARGETS[chosen], chosen), 0)
    step.finish()
    return [a - p.detach() for a, p in zip(before, model.parameters(), strict=True)]


def fifty_steps(world: World) -> dict[str, Any]:
    """Parameters, average and running statistics after two epochs of 25 steps."""
    model = make_model()
    # A process of its own beginning: they must be made equal.
    with torch.no_grad():
        model.head.weight += world.rank
    config = make_config(epochs=10, batch_size=8, model_ema=True, model_ema_decay=0.9)
    step = TrainStep(model, config, world, 25)
    loader = TrainingBatches(IMAGES, TARGETS, 8, seed=0, rank=world.rank, world_size=world.size)
    index = 0
    while index < 50:
        for batch in loader:
            if index < 50:
                step(batch, index)
            index += 1
    step.finish()
    apart = {k: v.clone() for k, v in model.state_dict().items()}
    step.join_statistics()
    assert step.average is not None
    return {
        "apart": apart,
        "model": dict(model.state_dict()),
        "average": dict(step.average.model.state_dict()),
    }


class Disturbed(TrainingBatches):
    """Something happens to one process before a step of the run."""

    def __init__(self, config: TrainingConfig, world: World, at: int, event: Any) -> None:
        super().__init__(
            IMAGES,
            TARGETS,
            config.batch_size,
            seed=config.seed,
            augment=make_loader(config).augment,
            rank=world.rank,
            world_size=world.size,
        )
        self.at, self.event = at, event

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(super().__iter__(), self.start_step):
            if (self.epoch - 1) * len(self) + index == self.at and self.rank == 1:
                batch = self.event(batch)
            yield batch


def nothing(batch: Batch) -> Batch:
    return batch


def terminate(batch: Batch) -> Batch:
    signal.raise_signal(signal.SIGTERM)
    return batch


def spoil(batch: Batch) -> Batch:
    return batch._replace(images=batch.images * torch.nan)


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def train(
    folder: Path,
    world: World,
    *,
    at: int = -1,
    event: Callable[[Batch], Batch] = nothing,
    resume: bool = False,
    change: Callable[[RunFolder], None] = lambda _: None,
) -> dict[str, Any]:
    """A run of four epochs; how it ended and what it left on this process."""
    config = make_config(model_ema=True, model_ema_decay=0.9)
    model = make_model()
    outcome: dict[str, Any] = {}
    try:
        run = RunFolder(folder, config.to_dict(), resume=resume, world=world)
        change(run)
        history = fit(
            model,
            Disturbed(config, world, at, event),
            Batches(*evaluation_data(), 8, rank=world.rank, world_size=world.size),
            config,
            run,
            world=world,
        )
        outcome["history"] = without_cost(history)
    except (TrainingStopped, FloatingPointError, OSError, ValueError) as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    world.signals.received = 0
    return {**outcome, "model": {k: v.clone() for k, v in model.state_dict().items()}}


def break_saving(run: RunFolder) -> None:
    """The main process alone meets a full disk."""
    run.save_state = full_disk  # type: ignore[assignment,method-assign]


def main() -> None:
    """All checks."""
    folder = Path(sys.argv[1])
    with training_session("cpu") as world:
        images, targets = evaluation_data()
        shares = Batches(images, targets, 5, rank=world.rank, world_size=world.size)
        accuracy = measure_accuracy(make_model(), shares, world=world)
        actual: dict[str, Any] = {
            "gradients": gradients(world),
            "accuracy": [accuracy.samples, accuracy.final, list(accuracy.early)],
            "fifty": fifty_steps(world),
            "whole": train(folder / "whole", world),
            "stopped": train(folder / "cut", world, at=4, event=terminate),
            "resumed": train(folder / "cut", world, resume=True),
            "spoiled": train(folder / "spoiled", world, at=4, event=spoil),
            "refused": train(folder / "whole", world),
            "full": train(folder / "full", world, change=break_saving),
        }
        torch.save(actual, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main()
