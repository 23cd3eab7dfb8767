"""Milliseconds of the host for a training step of ResNeXt-50, with what a GPU would do left out.

The step runs in a process of its own on CPU tensors of two images of 32 pixels. Kernels go the way
of sm_90 through Triton's own code to a driver that launches nothing; products, convolutions, casts
and the optimizer's updates are empty tensors. What PyTorch's other operators compute on more than
4,096 elements is timed in steps of its own and taken off, but for 5 microseconds each, which a
launch would take. Ways take turns; medians of processor time count. Beside them stand the kernels
and operators of a step, and the launches at 256 images of 160 pixels by the place that makes them,
see `launches.py`.

    python -m pytest benchmarks/cpu/bench_host.py --benchmark-only \
        --results benchmarks/results/cpu_host.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NETWORKS = {"coded": "coded_resnext50_32x4d", "plain": "resnext50_32x4d"}
WAYS = {
    "plain, layer by layer": ("plain", "torch"),
    "plain, kernels": ("plain", "triton"),
    "coded, layer by layer": ("coded", "torch"),
    "coded, fused": ("coded", "fused"),
    "coded, kernels": ("coded", "triton"),
}
ROUNDS = 7
BATCH, SIZE = 2, 32
# Elements that are computed as fast as nothing, and seconds of a launch.
SMALL, LAUNCH = 4096, 5e-6
CACHE = Path(__file__).resolve().parents[2] / "build" / "host"


def measure(networks: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of all ways, measured in a process without a GPU's work."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "CODED_RESNEXT_KERNELS": "",
        "TRITON_CACHE_DIR": str(CACHE),
    }
    line = [sys.executable, __file__, json.dumps(networks), str(rounds)]
    result = subprocess.run(line, env=environment, stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return rows


def test_host(benchmark: Any, record: Callable[[dict[str, Any]], None]) -> None:
    for row in benchmark.pedantic(measure, (NETWORKS, ROUNDS), rounds=1):
        record(row)
        print(f"\n{row}", end="")


@pytest.mark.parametrize("way", WAYS)
def test_launches(way: str, benchmark: Any, record: Callable[[dict[str, Any]], None]) -> None:
    import launches

    network, backend = WAYS[way]
    counted = benchmark.pedantic(launches.launches_of_step, (NETWORKS[network], backend), rounds=1)
    record({"way": way, "launches_256x160": counted.total()})
    print(f"\n{way}:\n{launches.table(counted, 12)}", end="")


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
    library = torch.library.Library("aten", "IMPL")

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
        library.impl(name, function, "CPU")
    return library


def make_step(name: str, backend: str) -> Callable[[], None]:
    """Returns a training step in bfloat16 autocast."""
    from coded_resnext import CodedLoss, create_model

    model = create_model(name, backend=backend).train().to(memory_format=torch.channels_last)
    loss = CodedLoss(model.codebooks, weight=4.0, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    targets = torch.zeros(BATCH, dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, energies = model(images, return_energies=True)
        loss(logits, energies, targets).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Prints the rows of all ways as JSON."""
    from triton.backends.nvidia.compiler import CUDABackend

    from coded_resnext.kernels import checks, layout
    from coded_resnext.kernels.build.steps import install_stub_driver

    networks, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    stub = install_stub_driver("sm90")
    # No GPU's code is made of what nobody runs.
    CUDABackend.make_cubin = lambda *_arguments: b"\0"
    # The code and not the name, which modules have imported from there.
    layout.interpreted.__code__ = (lambda: True).__code__
    layout.architecture_of.__code__ = (lambda x: "sm90").__code__
    checks._readable.__code__ = (lambda value: False).__code__
    steps = {way: make_step(networks[network], backend) for way, (network, backend) in WAYS.items()}
    library = leave_out_libraries()
    rows: dict[str, dict[str, Any]] = {}
    for way, step in steps.items():
        # The first compiles, and makes the optimizer's state.
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
            with _Operators() as operators:
                step()
            computed[way].append(operators.seconds)
            rows[way]["operators"] = operators.count
    del library
    for way, row in rows.items():
        step_ms, computed_ms = (1000 * statistics.median(each[way]) for each in (whole, computed))
        row["step_ms"], row["computed_ms"] = round(step_ms, 1), round(computed_ms, 1)
        row["host_ms"] = round(step_ms - computed_ms, 1)
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()
