"""The stages of check.py: calls that give rows, what matters most first.

A row says `what` it is about. `wrong` lists faults, where something was checked. A row that raises
is a fault of its own, and the stage goes on.

A call says how many seconds it is expected to take. Those of `right`, and of compiling, are what
an earlier form of the check took on an H100 with 16 processors (commit 38c8da6, torch 2.11, Triton
3.6): a row of an operator 0.3 s, of a grouped convolution 0.6, of a product, two kernels of which
were compiled for it, 1.3; 34 s for 297 kernels by 16 processes; 69 and 122 s for the plain and the
coded network under `torch.compile`, side by side. Networks that are run: steps by the milliseconds
of docs/fused_block.md, and 3 s to make each. The others are guesses.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bench_model import (
    SETTINGS,
    TINY,
    TINY_CLASSES,
    Contender,
    Runner,
    kernels_of,
    tiny_overrides,
)
from convolutions import GroupedCase, ProductCase, RecomputedCase, check_case, time_case
from model_check import BLOCKS, TINY_BLOCKS, check_block
from model_check import guard as accuracy_guard
from operators import IMAGENET, OPERATORS, compare, compiled, measure, registration, repeats
from operators import STAGES as CODED_STAGES
from operators import TINY as TINY_STAGES
from timing import Deadline, find_gpu, median_ms
from torch import Tensor
from torch._functorch import config as functorch_config

from coded_resnext import create_model
from coded_resnext.data.batches import Batch
from coded_resnext.kernels import ConvBackend
from coded_resnext.kernels.layout import architecture
from coded_resnext.kernels.rows import LaunchRow
from coded_resnext.training import step as training_step
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.processes import World
from coded_resnext.training.step import TrainStep, compiler_for

Row = dict[str, Any]
NETWORK, SMALL_NETWORK = "resnext50_32x4d", "resnext29_10x11d"
# bfloat16 first: it is what networks train in.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Samples of which the float64 definition forms the branch tensor at a time.
SAMPLES_AT_A_TIME = 32
# The same graph is run backward many times, which compiled graphs allow only without this.
functorch_config.donated_buffer = False
torch.backends.cudnn.benchmark = True


# Seconds that a stage's process takes to import everything and to wake the GPU.
START = 6.0
# Of what is compiled before anything else, all at once; and of a network that inductor then has.
COMPILING, COMPILED = 125.0, 30.0
# Of a network whose steps, or whose inference, are timed.
STEPS, INFERENCE = 5.0, 3.0


class Call(NamedTuple):
    """A row, or some, that a stage is going to write."""

    what: str
    run: Callable[[], Any]
    seconds: float
    """That it is expected to take on a GPU."""


class Task(NamedTuple):
    """How a stage runs."""

    dry: bool
    deadline: Deadline
    random_calls: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def repeats(self) -> int:
        return 3 if self.dry else 20

    @property
    def bandwidth(self) -> float | None:
        """Returns the bandwidth of the GPU's memory by its data sheet, bytes a second."""
        known = None if self.dry else find_gpu(torch.cuda.get_device_name())
        return known.bandwidth if known else None

    def rows(self, calls: Sequence[Call]) -> Iterator[Row]:
        """Yields the rows of calls, as long as there is time."""
        for what, run, _ in calls:
            if self.deadline.passed:
                yield {"what": what, "left_out": "time was up"}
                continue
            try:
                result = run()
                for row in result if isinstance(result, list) else [result]:
                    yield {"what": what, **row}
            except Exception as error:
                yield {"what": what, "wrong": [f"{type(error).__name__}: {error}"[:800]]}


def expected(stage: str) -> float:
    """Returns the seconds that a stage is expected to take on a GPU."""
    calls: list[Call] = globals()[stage](Task(dry=False, deadline=Deadline(0)))
    return START + sum(call.seconds for call in calls)


def build(task: Task) -> list[Call]:
    """Returns calls that compile the kernels of this GPU, and the networks of the headline, at
    once."""
    return [Call("kernels", lambda: _compile_all(task), COMPILING)]


def _compile_all(task: Task) -> list[Row]:
    from coded_resnext.cli.main import main

    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn").Process
    networks = {kind: spawn(target=_compile, args=(task, kind)) for kind in ("coded", "plain")}
    for process in networks.values():
        process.start()

    def row_of(what: str, status: int | None) -> Row:
        wrong = [f"exit status {status}"] if status else []
        return {"what": what, "seconds": time.perf_counter() - start, "wrong": wrong}

    rows: list[Row] = [{"left_out": "a dry run has no GPU to build for"}]
    if not task.dry:
        arch = architecture(0).removeprefix("sm")
        rows = [row_of("kernels", main(["build-kernels", "--arch", arch]))]
    for kind, process in networks.items():
        process.join()
        rows.append(row_of(f"compiled network, {kind}", process.exitcode))
    return rows


def _compile(task: Task, kind: str) -> None:
    """In a process of its own: leaves what the headline compiles in inductor's cache."""
    if not task.dry:
        torch.cuda.set_stream(torch.cuda.Stream())
    if kind == "coded":
        _by_project(task, kind, torchcompile="eager" if task.dry else "inductor")
    else:
        mode = None if task.dry else "default"
        runner_of(task, Contender("plain", "torch", mode), NETWORK).train()


def right(task: Task) -> list[Call]:
    """Returns calls that compare kernels with float64; then repeats, registration and
    compilation."""
    device, dry = task.device, task.dry
    coded_stages = TINY_STAGES if dry else CODED_STAGES
    blocks = TINY_BLOCKS if dry else BLOCKS
    calls: list[Call] = []
    for dtype in DTYPES:
        first = dtype == torch.bfloat16
        name = str(dtype).removeprefix("torch.")
        calls += [
            Call(
                f"{operator.name}, {stage.name}, {name}",
                lambda o=operator, s=stage, d=dtype: compare(o, s, d, device, SAMPLES_AT_A_TIME),
                0.3,
            )
            for operator in OPERATORS
            for stage in (coded_stages if first or dry else coded_stages[:3])
        ]
        if dtype == torch.float32:
            continue
        # What differs by dtype is the rounding alone, so that few layers show it.
        few = slice(None) if first or dry else slice(2)
        for kind, seconds in ((GroupedCase, 0.6), (ProductCase, 1.3), (RecomputedCase, 0.6)):
            calls += [
                Call(
                    f"{kind.title}, {layer.name}, {name}",
                    lambda k=kind, c=layer, d=dtype: check_case(k(c, d, device), task.repeats),
                    seconds,
                )
                for layer in (kind.tiny if dry else kind.layers)[few]
            ]
        calls += [
            Call(
                f"evaluation, {block.name}, {backend}, {name}",
                lambda b=block, w=backend, d=dtype: check_block(b, d, w, device, task.repeats),
                0.4,
            )
            for block in blocks[few]
            for backend in ("fused", "triton")
        ]
    compiler = "aot_eager" if dry else "inductor"
    stage = coded_stages[0]
    for operator in OPERATORS:
        calls += [
            Call(
                f"{operator.name}, repeats",
                lambda o=operator: repeats(
                    o, coded_stages[0], torch.bfloat16, device, task.repeats
                ),
                0.4,
            ),
            Call(
                f"{operator.name}, registration",
                lambda o=operator: list(registration(o, TINY_STAGES[0], torch.float32, device)),
                1.0,
            ),
            Call(
                f"{operator.name}, compilation",
                lambda o=operator: compiled(o, stage, torch.bfloat16, device, compiler),
                5.0,
            ),
        ]
    if task.random_calls:
        calls.append(Call("random calls", lambda: _random_calls(task), task.random_calls))
    return calls


def _random_calls(task: Task) -> Row:
    """Makes calls of every operator that hypothesis draws."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from torture.fuzz import fuzz_count

    fuzzed = fuzz_count(task.random_calls, device=task.device.type)
    return {"tried": fuzzed.tried, "seeds": fuzzed.seeds, "wrong": fuzzed.wrong}


def inputs_of(task: Task, network: str, pixels: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the images and targets of a network's batch."""
    size, batch = TINY if task.dry else SETTINGS[network]
    generator = torch.Generator().manual_seed(0)
    size = size if task.dry or pixels is None else pixels
    images = torch.randn(batch, 3, size, size, generator=generator)
    classes = TINY_CLASSES if task.dry else create_model(network).num_classes
    targets = torch.randint(classes, (batch,), generator=generator)
    return images.to(task.device), targets.to(task.device)


def runner_of(task: Task, contender: Contender, network: str, pixels: int | None = None) -> Runner:
    """Returns a contender on its images."""
    overrides = tiny_overrides(contender) if task.dry else {}
    dtype = torch.float32 if task.dry else torch.bfloat16
    images, targets = inputs_of(task, network, pixels)
    return Runner(contender, network, images, targets, dtype, overrides)


def timed(run: Callable[[], Any], images: int, task: Task) -> Row:
    """Returns the milliseconds of a call in a row of them, and those for which the host is busy."""
    steps = 1 if task.dry else 12
    for _ in range(0 if task.dry else 3):
        run()
    on_gpu = task.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    host = time.perf_counter() - start
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    row: Row = {"ms": 1e3 * seconds, "host_ms": 1e3 * host / steps}
    row["images_per_second"] = images / seconds
    if on_gpu:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def _captured(work: Callable[[], Any]) -> Callable[[], None]:
    """Returns a call as a CUDA graph."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    return training_step.record(work).replay


def _ways(task: Task, what: str, contender: Contender) -> list[Row]:
    """Returns a training step as it is and as a CUDA graph, one after the other."""
    runner = runner_of(task, contender, NETWORK)
    start = time.perf_counter()
    loss = float(runner.train())
    row = {"loss": loss, "first_step_s": time.perf_counter() - start}
    images = len(runner.images)
    rows = [{**row, "what": f"{what}, as it is", **timed(runner.train, images, task)}]
    if task.dry:
        return rows
    rows[0]["launches"] = kernels_of(runner.train)
    captured = timed(_captured(runner.train), images, task)
    return [*rows, {"what": f"{what}, graph", **captured}]


def _by_project(task: Task, kind: str, **settings: Any) -> Row:
    """Returns a step as training takes it: guard, metrics and optimizer included."""
    images, targets = inputs_of(task, NETWORK)
    contender = Contender("coded" if kind == "coded" else "plain")
    overrides = tiny_overrides(contender) if task.dry else {}
    model: Any = contender.build(NETWORK, overrides).to(task.device)
    config = TrainingConfig(
        epochs=1000,
        batch_size=len(images),
        lr=1e-3,
        amp=not task.dry,
        channels_last=True,
        **settings,
    )
    device = task.device
    chosen = compiler_for(config.torchcompile, device, "auto")
    dry = patch.multiple(
        training_step,
        unrecordable=lambda *_: None,
        record=lambda work: SimpleNamespace(replay=work),
    )
    with dry if task.dry else patch.object(training_step, "record", training_step.record):
        step = TrainStep(model.train(), config, World(device=device), 100)
        batch = Batch(images, targets, torch.arange(len(images)))
        count = iter(range(10**6))
        run = lambda: step(batch, next(count))  # noqa: E731
        # The third is recorded.
        for _ in range(4):
            run()
        row = timed(run, len(images), task)
        step.finish()
    return {**row, "compiled": chosen, "recorded": step._recorded is not None}


def headline(task: Task) -> list[Call]:
    """Returns calls that take a training step of ResNeXt-50 by each way; those that compile for
    long come later."""
    calls: list[Call] = []

    def project(name: str, seconds: float, **settings: Any) -> None:
        what = f"coded, train/imagenet.py's step, {name}"
        calls.append(Call(what, lambda: _by_project(task, "coded", **settings), seconds))

    def ways(kind: str, backend: str, *, compile: bool = False, merged: bool = False) -> None:
        mode = "default" if compile and not task.dry else None
        grouped: ConvBackend = "auto" if merged else "torch"
        contender = Contender(kind, backend, mode, grouped=grouped)  # type: ignore[arg-type]
        what = f"{kind}, {backend}" + ", compiled" * compile + ", groups merged" * merged
        seconds = STEPS + COMPILED * compile
        calls.append(Call(what, lambda: _ways(task, what, contender), seconds))

    project("graph", STEPS)
    for kind, backend in (("coded", "torch"), ("plain", "torch"), ("coded", "triton")):
        ways(kind, backend)
    project("compiled, graph", STEPS + COMPILED, torchcompile="eager" if task.dry else "inductor")
    ways("plain", "torch", compile=True)
    ways("plain", "torch", merged=True)
    if not task.dry:
        # In the interpreter a step by the kernels takes long.
        ways("coded", "fused")
    if find_spec("timm") is not None:
        ways("timm", "torch")
    else:
        calls.append(Call("timm, torch", lambda: {"left_out": "timm is not installed"}, 0.0))
    return calls


@contextmanager
def _bytes_of_launches() -> Iterator[dict[str, float]]:
    """Bytes of the tensors that each of our kernels is given, every one counted once a launch."""
    moved: dict[str, float] = {}
    launch = LaunchRow.launch

    def launched(row: LaunchRow, grid: tuple[int, ...], *args: Any) -> None:
        tensors = {
            a.data_ptr(): a.numel() * a.element_size() for a in args if isinstance(a, Tensor)
        }
        name = row.kernel.rpartition(":")[2]
        moved[name] = moved.get(name, 0.0) + sum(tensors.values())
        launch(row, grid, *args)

    with patch.object(LaunchRow, "launch", launched):
        yield moved


def _profile(task: Task, contender: Contender) -> Row:
    runner = runner_of(task, contender, NETWORK)
    for _ in range(0 if task.dry else 3):
        runner.train()
    with _bytes_of_launches() as moved:
        runner.train()
    if task.dry:
        return {"kernels": [{"name": n, "ms": 0.0, "count": 0} for n in moved], "device_ms": 0.0}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        runner.train()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name[:110], []).append(event.time_range.elapsed_us() / 1e3)
    kernels = []
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:60]:
        kernel = {"name": name, "ms": sum(each), "count": len(each)}
        if name in moved:
            kernel["bytes"] = moved[name]
            if task.bandwidth:
                kernel["share"] = moved[name] / task.bandwidth / (sum(each) / 1e3)
        kernels.append(kernel)
    total = sum(sum(each) for each in times.values())
    return {"kernels": kernels, "device_ms": total, "launches": sum(map(len, times.values()))}


def profile(task: Task) -> list[Call]:
    """Returns calls that tell where the time of one step goes, kernel by kernel."""
    pairs = [("coded", "triton"), ("coded", "torch"), ("plain", "torch")]
    return [
        Call(f"{kind}, {backend}", lambda k=kind, b=backend: _profile(task, Contender(k, b)), 3.0)
        for kind, backend in (pairs[:1] if task.dry else pairs)
    ]


def operators(task: Task) -> list[Call]:
    """Returns calls that time single operators beside their rivals, as device time."""
    device = task.device
    calls: list[Call] = []
    if not task.dry:
        calls.append(Call("copy of a gigabyte", lambda: _copy(device), 0.3))
    for stage in TINY_STAGES[:1] if task.dry else IMAGENET[:2]:
        calls += [
            Call(
                f"{operator.name}, {stage.name}",
                lambda o=operator, s=stage: measure(
                    o, s, torch.bfloat16, device, task.bandwidth, task.deadline
                ),
                2.0,
            )
            for operator in OPERATORS
        ]
    # Images of 160 pixels; of the ends of blocks those of 224, too.
    for kind, count, seconds in (
        (GroupedCase, 7, 2.0),
        (ProductCase, len(ProductCase.layers) // 2, 0.6),
        (RecomputedCase, None, 0.6),
    ):
        calls += [
            Call(
                f"{kind.title}, {layer.name}",
                lambda k=kind, c=layer: time_case(k(c, torch.bfloat16, device), task.bandwidth),
                seconds,
            )
            for layer in (kind.tiny if task.dry else kind.layers[:count])
        ]
    return calls


def _copy(device: torch.device) -> Row:
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return {"bytes_per_second": 2 * source.numel() / (ms / 1000)}


def networks(task: Task) -> list[Call]:
    """Returns calls for inference, and for networks for CIFAR; images of 224 pixels are for
    bench_model.py."""
    calls: list[Call] = []
    for kind, backend in (("coded", "torch"), ("coded", "triton"), ("plain", "torch")):
        one = Contender(kind, backend)  # type: ignore[arg-type]
        what = f"{NETWORK}, {kind}, {backend}, inference"
        calls.append(Call(what, lambda c=one: _inferred(task, c), INFERENCE))
        if not task.dry or backend != "triton":
            what = f"{SMALL_NETWORK}, {kind}, {backend}, graph"
            calls.append(Call(what, lambda c=one: _trained(task, c), STEPS))
    return calls


def _inferred(task: Task, contender: Contender) -> Row:
    runner = runner_of(task, contender, NETWORK)
    return timed(runner.infer, len(runner.images), task)


def _trained(task: Task, contender: Contender) -> Row:
    runner = runner_of(task, contender, SMALL_NETWORK)
    train = runner.train if task.dry else _captured(runner.train)
    return timed(train, len(runner.images), task)


def guard(task: Task) -> list[Call]:
    """Returns the call that tells whether 200 steps by the kernels learn what 200 steps layer by
    layer do."""

    def kept() -> Row:
        row = accuracy_guard(dry=task.dry)
        faults = [] if task.dry or row.get("kept", True) else ["the losses differ"]
        return {**row, "wrong": faults}

    # Four times 200 steps, for each of which the host needs some 50 ms.
    return [Call("accuracy guard", kept, 40.0)]
