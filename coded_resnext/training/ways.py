"""The ways to compute a training step, measured side by side on the machine at hand.

Which is fastest differs from GPU to GPU and from network to network. A way that computes something
else, or that fails, is none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_resnext.data.batches import Batch
from coded_resnext.files import brief
from coded_resnext.kernels.backend import Backend, backends
from coded_resnext.models.layers import copy_of
from coded_resnext.models.resnext import CodedResNeXt

from .config import Graph, TrainingConfig
from .guard import NonFiniteError
from .processes import World
from .step import TrainStep

# Steps that set up what is set up once; the third is recorded.
FIRST = 4
# How far the change of the weights may be from that in float32, relative to it; more where layer by
# layer in the run's own precision is further away.
NOISE = {"float32": 0.01, "bfloat16": 0.05, "float16": 0.05}
WORSE_THAN_LAYERS = 2.0


class Way(NamedTuple):
    """A way to compute a step, by the settings of a run that ask for it."""

    backend: Backend
    torchcompile: str = ""
    graph: Graph = "never"

    @property
    def flags(self) -> str:
        """Returns the flags of a training script that ask for it."""
        compiler = self.torchcompile or "''"
        return f"--backend {self.backend} --torchcompile {compiler} --graph {self.graph}"


class Measured(NamedTuple):
    """What was measured of a way."""

    way: Way
    milliseconds: float | None
    """Of a step; None where the way is none."""
    apart: float | None
    """Distance of the weights' change in one step from that in float32, relative to it."""
    fault: str | None
    """Why the way is none."""


def ways_on(device: torch.device) -> list[Way]:
    """Returns the ways that a device may have, layer by layer first."""
    if device.type != "cuda":
        return [Way("torch"), Way("fused")]
    ways = [Way("torch"), Way("torch", graph="always"), Way("torch", "inductor", "always")]
    if backends()["triton"] is None:
        ways += [Way("triton", graph="always"), Way("triton", "inductor", "always")]
    return ways


def measure_ways(
    model: CodedResNeXt,
    batch: Batch,
    config: TrainingConfig,
    ways: Sequence[Way] | None = None,
    *,
    steps: int = 10,
) -> list[Measured]:
    """Takes some steps of copies of a network in every way.

    Args:
        model: on its device, in training; it stays as it is.
        batch: this process's samples of a step.
        config: of the run; its own backend of `torch.compile` and graphs do not count.
        ways: what is tried, layer by layer first; None takes `ways_on` the device.
        steps: that are timed.

    Returns:
        A row for every way, in their order. Milliseconds are means over the steps.

    Raises:
        FloatingPointError: the first step is not finite layer by layer.
    """
    device = next(model.parameters()).device
    ways = ways_on(device) if ways is None else ways
    by_layers = Way("torch")
    noise = NOISE[config.amp_dtype if config.amp else "float32"]
    try:
        exact = _Try(model, by_layers, replace(config, amp=False)).change(batch)
        own = _Try(model, by_layers, config).change(batch)
    except NonFiniteError as error:
        raise FloatingPointError(f"layer by layer, {error}: no way can be compared") from error
    limit = WORSE_THAN_LAYERS * max(noise, _apart(own, exact))
    rows = []
    for way in ways:
        try:
            one = _Try(model, way, config)
            apart = _apart(one.change(batch), exact)
            # Written so that a NaN is a fault.
            if not apart <= limit:
                fault = f"{apart:.2g} apart from a step in float32, more than {limit:.2g}"
                rows.append(Measured(way, None, apart, fault))
                continue
            rows.append(Measured(way, one.milliseconds(batch, steps), apart, None))
        except Exception as error:
            # A kernel that does not compile or a device out of memory is a fault of the way.
            rows.append(Measured(way, None, None, brief(error)))
    return rows


def fastest(rows: Sequence[Measured]) -> Measured | None:
    """Returns the way with the shortest step, None where there is no way."""
    right = [row for row in rows if row.milliseconds is not None]
    return min(right, key=lambda row: row.milliseconds or 0.0, default=None)


def ways_in_words(rows: Sequence[Measured], images: int) -> str:
    """Returns a table of ways for batches of so many images, and the flags of the fastest."""
    lines = [f"{'way':<58} {'ms a step':>10} {'images/s':>9}"]
    for row in rows:
        if row.milliseconds is None:
            lines.append(f"{row.way.flags:<58} {row.fault}")
            continue
        rate = 1000 * images / row.milliseconds
        lines.append(f"{row.way.flags:<58} {row.milliseconds:>10.1f} {rate:>9.0f}")
    best = fastest(rows)
    lines.append("no way is right" if best is None else f"fastest: {best.way.flags}")
    return "\n".join(lines)


class _Try:
    """A copy of a network that makes its steps in one way."""

    def __init__(self, model: CodedResNeXt, way: Way, config: TrainingConfig) -> None:
        twin = copy_of(model).train()
        for block in twin.blocks:
            block.backend = way.backend
        changed: dict[str, Any] = {"torchcompile": way.torchcompile, "graph": way.graph}
        # The first step of a warm-up may be too small to be seen in the weights.
        changed |= {"warmup_epochs": 0.0, "warmup_lr": 0.0, "sched_on_updates": True}
        self.device = next(twin.parameters()).device
        self.step = TrainStep(twin, replace(config, **changed), World(device=self.device), 1000)
        self.count = 0

    def change(self, batch: Batch) -> list[Tensor]:
        """Makes the first step; returns what it changes in the weights, in float64."""
        before = [each.detach().double() for each in self.step.parameters]
        self._steps(batch, 1)
        pairs = zip(self.step.parameters, before, strict=True)
        return [after.detach().double() - old for after, old in pairs]

    def milliseconds(self, batch: Batch, steps: int) -> float:
        """Returns the mean time of steps, after those that set up."""
        self._steps(batch, FIRST)
        start = time.perf_counter()
        self._steps(batch, steps)
        return 1000 * (time.perf_counter() - start) / steps

    def _steps(self, batch: Batch, steps: int) -> None:
        for _ in range(steps):
            self.step(batch, self.count)
            self.count += 1
        self.step.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _apart(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Returns the norm of the difference over that of what is exact."""
    differences = torch.stack([(a - e).norm() for a, e in zip(actual, exact, strict=True)])
    return float(differences.norm() / torch.stack([e.norm() for e in exact]).norm())
