"""The ways to compute a step, measured before the first one: what `auto` means on a GPU.

Which is fastest differs from GPU to GPU and from network to network. Copies of the network take
some steps in each way, with images of the real shape. A way that computes something else, or that
fails, is refused; of the others the fastest is taken. What was measured is remembered by GPU,
versions, network, shape and settings.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from coded_resnext.data.batches import Batch
from coded_resnext.files import UNFIT, brief, read_json, say, write_atomically
from coded_resnext.kernels.backend import Backend, backends, named_backend
from coded_resnext.kernels.checks import check_kind, typed
from coded_resnext.kernels.layout import HAS_TRITON
from coded_resnext.kernels.prebuilt import default_folder
from coded_resnext.models.layers import copy_of
from coded_resnext.models.resnext import CodedResNeXt

from .config import Graph, TrainingConfig
from .processes import World
from .run_folder import describe_machine
from .step import TrainStep, compiler_for, is_recorded, unrecordable
from .warm_up import Calls, build_kernels

# Steps that set up what is set up once, of which the third is recorded, and steps that are timed.
FIRST, TIMED = 4, 10
# In the folder of a run.
WAYS_FILE = "ways.json"
# Measuring takes at most so many seconds, and so much of a run that begins with it.
LIMIT, SHARE = 300.0, 0.05
# How far the change of the weights may be from that in float32, relative to it; more where layer by
# layer in the run's own precision is further away.
NOISE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
WORSE_THAN_LAYERS = 2.0
# The losses are means over the samples, and may be apart by so much of it.
OF_LOSSES = 0.2
# Halvings of float16's first loss scale, 2**16.
SCALES = 16
TIME_WAS_UP = "time was up"
# Settings of a run that decide what a step computes, and therefore which way is fastest.
SETTINGS = (
    *("amp", "amp_dtype", "channels_last", "clip_grad", "grad_accum_steps", "mask_gradients"),
    *("mixup", "cutmix", "model_ema"),
)


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


BY_LAYERS = Way("torch")


class Measured(NamedTuple):
    """What was measured of a way."""

    way: Way
    milliseconds: float | None
    """Of a step; None where the way is none."""
    apart: float | None
    """Distance of the weights' change in one step from that in float32, relative to it."""
    fault: str | None
    """Why the way is none."""
    losses_apart: float | None = None
    """Distance of the losses of that step from those in float32, relative to them."""


@dataclass(frozen=True)
class Choice:
    """The way that is taken, and what was measured of all of them. As text it is a table."""

    way: Way
    rows: list[Measured]
    by_layers: float
    """Milliseconds of a step layer by layer, neither compiled nor recorded."""
    subject: dict[str, Any]
    """Machine, versions, network, shape of the images and settings."""

    def __str__(self) -> str:
        images = self.subject["images"][0]
        lines = [f"{'way to compute a step':<58} {'ms':>8} {'images/s':>9}"]
        for row in self.rows:
            if row.milliseconds is None:
                lines.append(f"{row.way.flags:<58} {row.fault}")
            else:
                rate = 1000 * images / row.milliseconds
                lines.append(f"{row.way.flags:<58} {row.milliseconds:>8.1f} {rate:>9.0f}")
        return "\n".join([*lines, f"taken: {self.way.flags}"])

    @property
    def gain(self) -> str:
        """Returns in words what the way gains."""
        milliseconds = next(row.milliseconds for row in self.rows if row.way == self.way)
        if milliseconds is None:
            return "not measured"
        times = self.by_layers / milliseconds
        return f"measured {milliseconds:.1f} ms, {times:.2f} times as fast as layer by layer"

    def described(self) -> dict[str, Any]:
        """Returns the same for a person, by headings."""
        rows = [
            {"way": row.way.flags, "ms a step": row.milliseconds, "fault": row.fault}
            for row in self.rows
        ]
        return {"taken": f"{self.way.flags}, {self.gain}", "measured": rows, "on": self.subject}

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        rows = [{**row._asdict(), "way": row.way._asdict()} for row in self.rows]
        return {**asdict(self), "way": self.way._asdict(), "rows": rows}


def read_choice(path: Path) -> Choice:
    """Returns a choice that was written as JSON.

    Raises:
        ValueError: the file holds none; the message names it.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        rows = [Measured(**{**row, "way": _way(row["way"])}) for row in content["rows"]]
        way, by_layers = _way(content["way"]), float(content["by_layers"])
        if way not in [row.way for row in rows]:
            raise ValueError("way: expected one that was measured")
        return Choice(way, rows, by_layers, dict(content["subject"]))
    except OSError:
        raise
    except UNFIT as error:
        raise ValueError(f"{path}: no measured ways to compute a step: {brief(error)}") from error


def _way(content: dict[str, Any]) -> Way:
    way = Way(**content)
    if way.backend not in get_args(Backend) or way.graph not in get_args(Graph):
        raise ValueError(f"way: expected a backend and graph that there are, got {content}")
    return way


def open_ways(config: TrainingConfig, backend: Backend, world: World) -> list[Way]:
    """Returns the ways that a run leaves open, first the one that it takes without measuring.

    A setting that is not `auto` stays what it is. What compiles for long comes last.
    """
    device, named = world.device, named_backend(backend)
    on_gpu = device.type == "cuda"
    kernels = ["triton"] if backends()["triton"] is None else []
    graphs = ["always"] if is_recorded(config, device, world) else ["never"]
    if config.graph == "auto" and unrecordable(device, world) is None:
        graphs.append("never")
    compilers = [compiler_for(config.torchcompile, device, backend)]
    if config.torchcompile == "auto" and on_gpu and HAS_TRITON:
        compilers = ["", "inductor"]
    by = ["torch", *kernels, "fused"] if named == "auto" else [named]
    default = Way(by[0], compiler_for(config.torchcompile, device, backend), graphs[0])  # type: ignore[arg-type]
    others = [Way(b, c, g) for c, b, g in product(compilers, by, graphs)]  # type: ignore[arg-type]
    return [default, *(way for way in others if way != default)]


def choose_way(
    model: CodedResNeXt,
    size: int,
    config: TrainingConfig,
    *,
    world: World | None = None,
    backend: Backend = "auto",
    seconds: float = LIMIT,
    run_steps: int | None = None,
    anew: bool = False,
) -> Choice | None:
    """Measures the ways that a run leaves open, or remembers what was measured of them.

    Args:
        model: on its device; it stays as it is.
        size: height and width of the images, in pixels.
        config: of the run.
        world: the processes of the run; this one measures alone, on its share of a batch.
        backend: what the run asks for.
        seconds: after which no other way is begun.
        run_steps: of the run; measuring then takes at most a twentieth of its time.
        anew: measure also what is remembered.

    Returns:
        The choice; None where there is nothing to choose, or too little time to.
    """
    world = world or World(device=next(model.parameters()).device)
    ways = open_ways(config, backend, world)
    shape = (config.local_batch_size(world.size), model.config["in_channels"], size, size)
    settings = {name: getattr(config, name) for name in SETTINGS}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator)
    targets = torch.randint(model.num_classes, (len(images),), generator=generator)
    batch = Batch(images, targets, torch.arange(len(images)))

    def attempt(way: Way, *, exact: bool = False) -> _Attempt:
        return _Step(model, way, replace(config, amp=False) if exact else config, batch)

    return _choose(
        ways,
        attempt,
        {**_subject(model, images, ways), "settings": settings},
        noise=NOISE[getattr(torch, config.amp_dtype) if config.amp else torch.float32],
        seconds=seconds,
        run_steps=run_steps,
        anew=anew,
        device=world.device,
    )


@typed
def choose_backend(
    model: CodedResNeXt,
    images: Tensor,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    *,
    seconds: float = LIMIT,
    anew: bool = False,
) -> Choice | None:
    """Gives a network's blocks the backend that is fastest here; for training loops of one's own.

    It is called in the mode (`train` or `eval`) and under the autocast of the calls to come, and
    leaves no kernel to compile in them, as `warm_up` does for the backend that a network has. In
    evaluation, the forward pass alone is timed.

    Args:
        model: on its device; of it the backend of the blocks is changed and nothing else.
        images: `[B, C, H, W]` as in a step.
        loss: from a copy of the model and the images to a scalar; by default the mean square of the
            logits.
        seconds: after which no other backend is begun.
        anew: measure also what is remembered.

    Returns:
        What was measured; None where there was too little time, and the backend stays.
    """
    check_kind("model", model, CodedResNeXt, "a CodedResNeXt, whose blocks have backends")
    ways = open_ways(TrainingConfig(1, len(images), 0.1, graph="never"), "auto", World())
    kind, autocast = images.device.type, torch.is_autocast_enabled(images.device.type)

    def attempt(way: Way, *, exact: bool = False) -> _Attempt:
        return _Call(_with_backend(model, way), images, loss, exact=exact)

    dtype = torch.get_autocast_dtype(kind) if autocast else images.dtype
    of_call = {"loss": getattr(loss, "__qualname__", None), "training": model.training}
    subject = {**_subject(model, images, ways), "settings": {**of_call, "dtype": str(dtype)}}
    choice = _choose(
        *(ways, attempt, subject),
        noise=NOISE[dtype],
        seconds=seconds,
        anew=anew,
        device=images.device,
    )
    if choice is not None:
        for block in model.blocks:
            block.backend = choice.way.backend
    return choice


def _subject(model: CodedResNeXt, images: Tensor, ways: Sequence[Way]) -> dict[str, Any]:
    """Returns what a choice depends on, as JSON reads it back."""
    machine = describe_machine()
    del machine["date"]
    described = {
        "machine": machine,
        "network": model.config,
        "trained": sum(parameter.requires_grad for parameter in model.parameters()),
        "images": images.shape,
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "ways": [way.flags for way in ways],
    }
    content: dict[str, Any] = json.loads(json.dumps(described))
    return content


def _choose(
    ways: Sequence[Way],
    attempt: Callable[..., _Attempt],
    subject: dict[str, Any],
    *,
    noise: float,
    seconds: float,
    run_steps: int | None = None,
    anew: bool = False,
    device: torch.device,
) -> Choice | None:
    """Returns the choice among ways, remembered or measured."""
    too_short = run_steps is not None and SHARE * run_steps < 2 + FIRST + TIMED
    if len(ways) < 2 or too_short or seconds <= 0:
        return None
    subject = json.loads(json.dumps(subject))
    path = _memory_of(subject)
    if path is not None and path.is_file() and not anew:
        try:
            remembered = read_choice(path)
            if remembered.subject == subject and remembered.way in ways:
                return remembered
        except (ValueError, OSError):
            pass
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        choice = _measure(ways, attempt, subject, noise, seconds, run_steps, device)
    whole = choice is not None and not any(row.fault == TIME_WAS_UP for row in choice.rows)
    if choice is not None and path is not None and (whole or seconds >= LIMIT):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(choice.to_dict(), indent=1).encode())
        except OSError as error:
            say(f"what was measured is not remembered: {error}", file=sys.stderr)
    return choice


def _memory_of(subject: dict[str, Any]) -> Path | None:
    """Returns where a choice is remembered: beside the kernels, None for a user without a home."""
    folder = default_folder()
    digest = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
    return None if folder is None else folder / "ways" / f"{digest[:32]}.json"


def _measure(
    ways: Sequence[Way],
    attempt: Callable[..., _Attempt],
    subject: dict[str, Any],
    noise: float,
    seconds: float,
    run_steps: int | None,
    device: torch.device,
) -> Choice | None:
    """Returns a row for every way, in their order; None where not even the first was tried."""
    start = time.monotonic()
    try:
        layers = attempt(BY_LAYERS)
        own, by_layers = layers.first(), layers.milliseconds()
        del layers
        exact = _in_float32(attempt) or own
    except Exception as error:
        # If it is the run's, the run will say it again.
        say(f"no way is measured, since layer by layer: {error}", file=sys.stderr)
        return None
    apart = _apart(own, exact)
    if run_steps is not None:
        seconds = min(seconds, SHARE * run_steps * by_layers / 1000)
    if time.monotonic() - start > seconds:
        return None
    if any(way.backend in ("fused", "triton") for way in ways):
        # Of use for every later run, and no part of the time of this one's measuring.
        before = time.monotonic()
        build_kernels(device)
        start += time.monotonic() - before
    limits = _Apart(
        WORSE_THAN_LAYERS * max(noise, apart.change),
        WORSE_THAN_LAYERS * max(OF_LOSSES * noise, apart.losses),
    )
    rows = [
        Measured(way, by_layers, apart.change, None, apart.losses)
        if way == BY_LAYERS
        else _row(way, attempt, exact, limits, start + seconds)
        for way in ways
    ]
    if rows[0].fault == TIME_WAS_UP:
        return None
    right = [row for row in rows if row.milliseconds is not None]
    best = min(right, key=lambda row: row.milliseconds or 0.0, default=rows[0])
    return Choice(best.way, rows, by_layers, subject)


def _in_float32(attempt: Callable[..., _Attempt]) -> _First | None:
    """Returns what comes of layer by layer in float32; None where the memory is too small."""
    try:
        return attempt(BY_LAYERS, exact=True).first()
    except torch.OutOfMemoryError:
        return None


def _row(
    way: Way,
    attempt: Callable[..., _Attempt],
    exact: _First,
    limits: _Apart,
    deadline: float,
) -> Measured:
    if time.monotonic() > deadline:
        return Measured(way, None, None, TIME_WAS_UP)
    try:
        row = _tried(way, attempt, exact, limits)
    except Exception as error:
        # A kernel that does not compile or a device out of memory is a fault of the way.
        row = Measured(way, None, None, f"left out: {brief(error)}")
    if way.torchcompile:
        # Of many networks compiled in a process, the last would not be.
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise ValueError(
                f"{way.flags}: the GPU computes nothing more in this process since this way was "
                f"tried: {str(error).partition(chr(10))[0]}; begin again with another --backend, "
                "--torchcompile or --graph, or without measuring (--tune-seconds 0)"
            ) from error
    torch.cuda.empty_cache()
    return row


def _tried(way: Way, attempt: Callable[..., _Attempt], exact: _First, limits: _Apart) -> Measured:
    one = attempt(way)
    apart = _apart(one.first(), exact)
    for what, distance, limit in zip(("results", "losses"), apart, limits, strict=True):
        # Written so that a NaN is a fault.
        if not distance <= limit:
            words = f"{distance:.2g} apart from those in float32, more than {limit:.2g}"
            fault = f"refused: its {what} are {words}"
            say(f"warning: {way.flags} is {fault}", file=sys.stderr)
            return Measured(way, None, apart.change, fault, apart.losses)
    return Measured(way, one.milliseconds(), apart.change, None, apart.losses)


class _First(NamedTuple):
    """What comes of a first step, in float64."""

    change: list[Tensor]
    losses: list[Tensor]


class _Apart(NamedTuple):
    """How far what comes of it is from that in float32, or may be, relative to it."""

    change: float
    losses: float


class _Attempt(Protocol):
    """A copy of a network that computes in one way."""

    def first(self) -> _First:
        """Computes once."""

    def milliseconds(self) -> float:
        """Returns the mean time of a step, after those that set up."""


def _timed(steps: Callable[[int], Any], device: torch.device) -> float:
    def wait(count: int) -> float:
        steps(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = wait(FIRST)
    return 1000 * (wait(TIMED) - start) / TIMED


def _with_backend(model: CodedResNeXt, way: Way) -> CodedResNeXt:
    twin = copy_of(model)
    for block in twin.blocks:
        block.backend = way.backend
    return twin


class _Step:
    """Steps of a training, of which the first counts by what it changes in the weights."""

    def __init__(self, model: CodedResNeXt, way: Way, config: TrainingConfig, batch: Batch) -> None:
        twin = _with_backend(model, way).train()
        changed: dict[str, Any] = {"torchcompile": way.torchcompile, "graph": way.graph}
        # The first step of a warm-up may be too small to be seen in the weights.
        changed |= {"warmup_epochs": 0.0, "warmup_lr": 0.0, "sched_on_updates": True}
        changed |= {"batch_size": len(batch.images)}
        self.device, self.batch = next(twin.parameters()).device, batch
        self.step = TrainStep(twin, replace(config, **changed), World(device=self.device), 1000)
        self.count = 0

    def first(self) -> _First:
        before = [each.detach().double() for each in self.step.parameters]
        # In float16 the loss is scaled too much at first, and steps change nothing.
        for _ in range(SCALES):
            self._steps(1)
            self.count = 0
            pairs = zip(self.step.parameters, before, strict=True)
            change = [after.detach().double() - old for after, old in pairs]
            if any(bool(each.any()) for each in change):
                break
        # Steps without a warm-up might end in numbers that are not finite.
        self.step.config = replace(self.step.config, lr=1e-12, min_lr=0.0)
        terms = 2 + len(self.step.model.codebooks)
        return _First(change, [self.step.latest[:terms].clone()])

    def milliseconds(self) -> float:
        return _timed(self._steps, self.device)

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.batch, self.count)
            self.count += 1
        self.step.finish()


class _Call(Calls):
    """Calls of a network, of which the first counts by its gradients, in evaluation by logits."""

    def first(self) -> _First:
        torch.manual_seed(0)
        result = self().detach().double()
        if not self.twin.training:
            return _First([result], [])
        gradients = [p.grad.double() for p in self.twin.parameters() if p.grad is not None]
        return _First(gradients, [result])

    def milliseconds(self) -> float:
        return _timed(self, self.images.device)


def _apart(actual: _First, exact: _First) -> _Apart:
    """Returns the norms of the differences over those of what is exact."""
    return _Apart(*(_distance(*pair) for pair in zip(actual, exact, strict=True)))


def _distance(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    if not exact:
        return 0.0
    differences = torch.stack([(a - e).norm() for a, e in zip(actual, exact, strict=True)])
    return float(differences.norm() / torch.stack([e.norm() for e in exact]).norm())
