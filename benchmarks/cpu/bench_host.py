"""What a training step costs the host: its milliseconds, and what it launches. No GPU is needed.

**Milliseconds** are those of ResNeXt-50, with what a GPU would do left out. The step runs in a
process of its own on CPU tensors of two images of 32 pixels. Kernels go the way of sm_90 through
Triton's own code to a driver that launches nothing; products, convolutions, casts and the
optimizer's updates are empty tensors. What PyTorch's other operators compute on more than 4,096
elements is timed in steps of its own and taken off, but for 5 microseconds each, which a launch
would take. Ways take turns; medians of processor time count. Beside them stand the kernels and
operators of a step. A captured way runs the graphs of torch.compile operator by operator: inductor
would write code for the CPU here.

    python -m pytest benchmarks/cpu/bench_host.py --benchmark-only \
        --results benchmarks/results/cpu_host.json

**Launches** are counted by the line of the project that makes them.

    python benchmarks/cpu/bench_host.py coded_resnext50_32x4d --backend triton

This step runs on tensors of the true sizes that have no values (PyTorch's FakeTensorMode), so that
shapes, strides and dtypes are followed and nothing is computed. Every call of ATen counts as one
launch, but for those that only look at a tensor in another way or allocate one; every launch of a
Triton kernel counts as one, by the settings of sm90. A library may launch several kernels for one
call: a profile differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from coded_resnext import CodedLoss, CodedResNeXt, create_model
from coded_resnext.kernels import checks, layout, replay
from coded_resnext.kernels.conv1x1 import library
from coded_resnext.kernels.rows import LaunchRow, without_launches

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {"coded": "coded_resnext50_32x4d", "plain": "resnext50_32x4d"}
WAYS = {
    "plain, layer by layer": ("plain", "torch"),
    "plain, kernels": ("plain", "triton"),
    "coded, layer by layer": ("coded", "torch"),
    "coded, fused": ("coded", "fused"),
    "coded, kernels": ("coded", "triton"),
}
CAPTURED = {way: f"{way}, captured" for way in ("plain, layer by layer", "coded, kernels")}
ROUNDS = 7
BATCH, SIZE = 2, 32
# Elements that are computed as fast as nothing, and seconds of a launch.
SMALL, LAUNCH = 4096, 5e-6
CACHE = ROOT / "build" / "host"
# Says on the command line that this is the process of `measure`.
MEASURED = "--measured"
LIBRARY = ("coded_resnext", "kernels")
# Calls that start no kernel: another view of a tensor, an allocation, a question.
NOTHING = {
    *(
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "squeeze",
    ),
    *("t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"),
    *("device", "is_same_size", "result_type", "sym_size", "sym_stride"),
    *("_record_function_enter_new", "_record_function_exit"),
}


def measure(networks: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of all ways, measured in a process without a GPU's work."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "CODED_RESNEXT_KERNELS": "",
        "TRITON_CACHE_DIR": str(CACHE),
    }
    line = [sys.executable, __file__, MEASURED, json.dumps(networks), str(rounds)]
    result = subprocess.run(line, env=environment, stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return rows


def test_host(benchmark: Any, record: Callable[[dict[str, Any]], None]) -> None:
    for row in benchmark.pedantic(measure, (NETWORKS, ROUNDS), rounds=1):
        record(row)
        print(f"\n{row}", end="")


@pytest.mark.parametrize("way", WAYS)
def test_launches(way: str, benchmark: Any, record: Callable[[dict[str, Any]], None]) -> None:
    network, backend = WAYS[way]
    counted = benchmark.pedantic(launches_of_step, (NETWORKS[network], backend), rounds=1)
    record({"way": way, "launches_256x160": counted.total()})
    print(f"\n{way}:\n{table(counted, 12)}", end="")


class _Operators(TorchDispatchMode):
    """Counts the calls of operators, and times what they compute on more than a few elements."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seconds = 0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        begun = time.process_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.process_time() - begun
        tensors = (x for x in pytree.tree_leaves((args, result)) if isinstance(x, Tensor))
        # The project's own operators are the host's.
        if func.namespace == "aten" and max((x.numel() for x in tensors), default=0) > SMALL:
            self.seconds += max(seconds - LAUNCH, 0.0)
        return result


def leave_out_libraries() -> torch.library.Library:
    """Makes nothing of what cuDNN, cuBLAS and passes over all weights would do, while it lives."""
    implemented = torch.library.Library("aten", "IMPL")

    def convolution(x: Tensor, weight: Tensor, bias: Any, *options: Any) -> Tensor:
        stride, padding, dilation, is_transposed, *_ = options
        assert not is_transposed
        sides = (
            (length + 2 * p - d * (kernel - 1) - 1) // s + 1
            for length, kernel, s, p, d in zip(
                x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        )
        shape = (len(x), len(weight), *sides)
        return x.new_empty(shape).to(memory_format=torch.channels_last)

    def convolution_backward(
        gradient: Tensor, x: Tensor, weight: Tensor, sizes: Any, *options: Any
    ) -> tuple[Tensor | None, ...]:
        wanted = options[-1]
        made = (x, weight, gradient[0, :, 0, 0])
        return tuple(
            torch.empty_like(each) if is_wanted else None
            for each, is_wanted in zip(made, wanted, strict=True)
        )

    def copied(x: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        if not isinstance(x, Tensor):
            return torch.tensor(x, dtype=dtype)
        return torch.empty_like(
            x, dtype=dtype or x.dtype, memory_format=memory_format or torch.preserve_format
        )

    replaced: dict[str, Callable[..., Any]] = {
        "convolution": convolution,
        "convolution_backward": convolution_backward,
        "mm": lambda a, b: a.new_empty(len(a), b.shape[1]),
        "addmm": lambda c, a, b, **_: a.new_empty(len(a), b.shape[1]),
        "bmm": lambda a, b: a.new_empty(len(a), a.shape[1], b.shape[2]),
        "_to_copy": copied,
        "_foreach_add_.List": lambda *_, **__: None,
        "_foreach_mul_.Scalar": lambda *_, **__: None,
    }
    for name, function in replaced.items():
        implemented.impl(name, function, "CPU")
    return implemented


def make_step(
    model: CodedResNeXt,
    loss: CodedLoss,
    images: Tensor,
    targets: Tensor,
    *,
    captured: bool = False,
) -> Callable[[], None]:
    """Returns a training step in bfloat16 autocast."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    network = torch.compile(model, backend="aot_eager", dynamic=False) if captured else model

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, energies = network(images, return_energies=True)
        loss(logits, energies, targets).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_model(name: str, backend: str) -> tuple[CodedResNeXt, CodedLoss]:
    """Returns a network for training, channels-last, and its loss."""
    model = create_model(name, backend=backend).train().to(memory_format=torch.channels_last)
    return model, CodedLoss(model.codebooks, weight=4.0, backend=backend)


def print_rows(networks: dict[str, str], rounds: int) -> None:
    """Prints the rows of all ways as JSON, in the process of `measure`."""
    from triton.backends.nvidia.compiler import CUDABackend

    from coded_resnext.kernels.build.steps import install_stub_driver

    torch.set_num_threads(1)
    stub = install_stub_driver("sm90")
    # No GPU's code is made of what nobody runs.
    CUDABackend.make_cubin = lambda *_arguments: b"\0"
    # The code and not the name, which modules have imported from there.
    layout.interpreted.__code__ = (lambda: True).__code__
    layout.architecture_of.__code__ = (lambda x: "sm90").__code__
    checks._readable.__code__ = (lambda value: False).__code__
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    targets = torch.zeros(BATCH, dtype=torch.int64)
    steps = {
        way: make_step(*make_model(networks[network], backend), images, targets)
        for way, (network, backend) in WAYS.items()
    }
    for way, name in CAPTURED.items():
        network, backend = WAYS[way]
        model = make_model(networks[network], backend)
        steps[name] = make_step(*model, images, targets, captured=True)
    left_out = leave_out_libraries()
    rows: dict[str, dict[str, Any]] = {}
    for way, step in steps.items():
        # The first compiles, and makes the optimizer's state; the second is recorded.
        step()
        step()
        stub.launches.clear()
        step()
        rows[way] = {"way": way, "kernels": len(stub.launches)}
    whole: dict[str, list[float]] = {way: [] for way in steps}
    computed: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            begun = time.process_time()
            step()
            whole[way].append(time.process_time() - begun)
            # Those of a replay, which nobody sees otherwise.
            unseen = mock.patch.object(replay, "observed", return_value=False)
            with unseen, _Operators() as operators:
                step()
            computed[way].append(operators.seconds)
            # Graphs are not run while somebody sees operators.
            if way in WAYS:
                rows[way]["operators"] = operators.count
    del left_out
    for way, row in rows.items():
        step_ms, computed_ms = (1000 * statistics.median(each[way]) for each in (whole, computed))
        row["step_ms"], row["computed_ms"] = round(step_ms, 1), round(computed_ms, 1)
        row["host_ms"] = round(step_ms - computed_ms, 1)
    print(json.dumps(list(rows.values())))


class Counting(TorchDispatchMode):
    """Notes each call that starts a kernel, with the line of the project that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[str] = Counter()

    def note(self, name: str, tensors: Iterable[object]) -> None:
        self.launches[_caller(), name] += 1
        each = {id(value): value for value in tensors if isinstance(value, Tensor)}
        self.bytes[name] += sum(value.numel() * value.element_size() for value in each.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name not in NOTHING:
            self.note(name, pytree.tree_leaves((args, kwargs, result)))
        return result


def _caller() -> str:
    """Returns the innermost line of the library on the stack, or what runs without one."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in LIBRARY:
            name = str(path.relative_to(ROOT)).replace("coded_resnext/kernels", "kernels")
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    node = torch._C._current_autograd_node()
    return "(PyTorch)" if node is None else f"(autograd) {node.name()}"


@contextmanager
def _as_on_a_gpu() -> Iterator[Counting]:
    """Lets kernels be chosen as on sm90, and counts launches instead of making them."""
    counting = Counting()

    def launch(row: LaunchRow, _grid: object, *arguments: object) -> None:
        counting.note(f"triton {row.kernel.partition(':')[2]}", arguments)

    def wide_product(left: Tensor, right: Tensor) -> Tensor:
        # One product by cuBLAS, which PyTorch has on a GPU alone.
        result = left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)
        counting.note("mm", (left, right, result))
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(LaunchRow, "launch", launch))
        stack.enter_context(mock.patch.object(layout, "architecture_of", return_value="sm90"))
        stack.enter_context(mock.patch.object(layout, "too_large", return_value=None))
        # Values are looked at on the CPU alone.
        stack.enter_context(mock.patch.object(checks, "_readable", return_value=False))
        stack.enter_context(mock.patch.object(library, "_sums_wide", return_value=True))
        stack.enter_context(mock.patch.object(library, "_wide_product", wide_product))
        stack.enter_context(without_launches())
        yield counting


def launches_of_step(
    name: str, backend: str, *, batch: int = 256, size: int = 160
) -> Counter[tuple[str, str]]:
    """Returns the launches of `counted_step`, by the line that makes them and by kernel."""
    return counted_step(name, backend, batch=batch, size=size).launches


# Without it there would be no kernels on a CPU.
@mock.patch.dict(os.environ, TRITON_INTERPRET="1")
def counted_step(name: str, backend: str, *, batch: int = 256, size: int = 160) -> Counting:
    """Counts a training step in bfloat16 autocast: its launches, and the bytes of their tensors.

    Args:
        name: of a network.
        backend: of its blocks, and of its loss.
        batch, size: images, and their height and width in pixels.
    """
    model, loss = make_model(name, backend)
    with _as_on_a_gpu() as counting, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, value in tensors.items():
                    if value is not None:
                        tensors[key] = mode.from_tensor(value)
        images = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
        targets = torch.zeros(batch, dtype=torch.int64)
        step = make_step(model, loss, images, targets)
        # The first step makes the optimizer's state.
        step()
        counting.launches.clear()
        counting.bytes.clear()
        with counting:
            step()
    return counting


def table(launches: Counter[tuple[str, str]], most: int) -> str:
    """Returns the lines with the most launches as Markdown."""
    by_line: dict[str, Counter[str]] = {}
    for (where, name), count in launches.items():
        by_line.setdefault(where, Counter())[name] += count
    rows = sorted(by_line.items(), key=lambda item: -item[1].total())[:most]
    lines = ["| line | launches | of |", "|---|---|---|"]
    for where, counts in rows:
        of = ", ".join(f"{name} {count}" for name, count in counts.most_common(6))
        lines.append(f"| {where} | {counts.total()} | {of} |")
    return "\n".join(lines)


def table_of_bytes(counting: Counting, most: int) -> str:
    """Returns the kernels with the most bytes as Markdown: each tensor of a launch once."""
    counts: Counter[str] = Counter()
    for (_, name), count in counting.launches.items():
        counts[name] += count
    lines = ["| kernel | launches | GB | ms at 3.0 TB/s |", "|---|---|---|---|"]
    for name, size in counting.bytes.most_common(most):
        lines.append(f"| {name} | {counts[name]} | {size / 1e9:.2f} | {size / 3e9:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the launches of a network's step as a table."""
    if sys.argv[1:2] == [MEASURED]:
        print_rows(json.loads(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description="Counts what a training step launches on a GPU, by the line that launches it."
    )
    parser.add_argument("network", help="name of a network, such as coded_resnext50_32x4d")
    parser.add_argument("--backend", default="triton", help="of its blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="pixels (default: %(default)s)")
    parser.add_argument("--most", type=int, default=40, help="rows (default: %(default)s)")
    parser.add_argument("--bytes", action="store_true", help="by kernel, with bytes, not by line")
    options = parser.parse_args()
    counted = counted_step(options.network, options.backend, batch=options.batch, size=options.size)
    by_kernel = table_of_bytes(counted, options.most)
    print(by_kernel if options.bytes else table(counted.launches, options.most))
    total, moved = counted.launches.total(), counted.bytes.total() / 1e9
    print(
        f"\n{total} launches and {moved:.1f} GB of a step of {options.network} by {options.backend}"
    )


if __name__ == "__main__":
    main()
