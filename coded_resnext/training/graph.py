"""The device's part of a training step, recorded once and replayed for every batch.

A GPU that is told of every launch by Python waits for Python: a coded ResNeXt-50 has 2,154 launches
a step. A CUDA graph holds them all. What a step draws is drawn anew in a replay, from the
generators' state at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .config import TrainingConfig
from .processes import World


class Computed(NamedTuple):
    """What a step has computed before its update."""

    values: Tensor
    """The metrics."""
    bad: Tensor
    """Booleans: what was not finite."""
    overflow: Tensor
    """Whether the gradient was not, a boolean."""


class DevicePart(NamedTuple):
    """A step but for what the host reads and decides."""

    compute: Callable[[Tensor, Tensor], Computed]
    """Leaves the gradients of images and targets."""
    update: Callable[[Computed, Tensor], None]
    """Updates the weights, unless the second argument is 1."""


class Recording(Protocol):
    """Launches that can be made again."""

    def replay(self) -> None:
        """Make them."""


def record(work: Callable[[], None]) -> Recording:
    """Records the launches of a function, which are not made yet, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # The data loader's threads may allocate memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


def recorded(part: DevicePart, images: Tensor, targets: Tensor) -> DevicePart:
    """Records a step for batches with the shapes, dtypes and layouts of these.

    Every shape must have been through the step before, so that what is set up once is set up.
    """
    own_images, own_targets = torch.empty_like(images), torch.empty_like(targets)
    gate = torch.zeros((), device=images.device)
    made: list[Computed] = []

    def fill() -> None:
        made[:] = [part.compute(own_images, own_targets)]

    first = record(fill)
    second = record(lambda: part.update(made[0], gate))

    def compute(images: Tensor, targets: Tensor) -> Computed:
        own_images.copy_(images)
        own_targets.copy_(targets)
        first.replay()
        return made[0]

    def update(_: Computed, keeps: Tensor) -> None:
        gate.copy_(keeps)
        second.replay()

    return DevicePart(compute, update)


def unrecordable(device: torch.device, world: World) -> str | None:
    """Returns why the steps of a training cannot be recorded; None if they can."""
    if device.type != "cuda":
        return f"the network is on {device.type}, not on a GPU"
    if world.is_shared:
        return f"its gradients are added up over {world.size} processes"
    return None


def is_recorded(config: TrainingConfig, device: torch.device, world: World) -> bool:
    """Returns whether the steps of a training are recorded.

    Raises:
        ValueError: they have to be and cannot.
    """
    reason = unrecordable(device, world)
    if config.graph == "always" and reason is not None:
        raise ValueError(f"graph: a step cannot be recorded, since {reason}; expected auto")
    return config.graph != "never" and reason is None
