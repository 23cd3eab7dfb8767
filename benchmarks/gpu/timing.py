"""How long an operator takes and what memory it needs, beside its rivals.

On a GPU device time, as a CUDA graph, the second-level cache emptied before every run. On a CPU,
which only a dry run uses, PyTorch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from agreement import inputs_of, upstream_of
from operators import Form, Operator, Place
from torch.utils.benchmark import Timer


class Deadline:
    """A number of minutes from now.

    Args:
        minutes: after which `passed` is true.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        return time.monotonic() > self._end


def median_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call, milliseconds.

    On a GPU on its own, without the host: a short kernel takes a tenth of the time that it takes to
    launch it. What a call does backward must have gone forward on the present stream, which must
    not be the default one.
    """
    if device.type == "cuda":
        flush = torch.empty(2**28, dtype=torch.uint8, device=device)
        both = _graph_ms(lambda: (flush.zero_(), run()), device)
        return both - _graph_ms(flush.zero_, device)
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1000 * float(timer.timeit(2).median)


def _graph_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call within CUDA graphs of ten, milliseconds."""
    if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            return _graph_ms(run, device)
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        for _ in range(10):
            run()
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times)


def host_ms(run: Callable[[], Any]) -> float:
    """Milliseconds for which a call keeps the host busy."""
    start = time.perf_counter()
    for _ in range(10):
        run()
    return 100 * (time.perf_counter() - start)


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Memory that a call adds at its peak, MiB; None where nobody counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def forms_of(operator: Operator, *, compile_with: str | None) -> Iterator[tuple[str, Form]]:
    """Everything that is timed, the kernel first; compiled forms where there is a compiler."""
    yield "kernel", operator.kernel
    if operator.replaced is not None:
        yield "replaced", operator.replaced
    others = {**operator.rivals, "definition": operator.definition}
    yield from others.items()
    if compile_with is not None:
        for name, form in others.items():
            torch.compiler.reset()
            yield f"compiled {name}", torch.compile(form, dynamic=False, backend=compile_with)


def measure(
    operator: Operator,
    place: Place,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float | None,
    deadline: Deadline,
) -> list[dict[str, Any]]:
    """Two rows of the table, for the forward and the backward pass.

    A form that the time or the memory does not suffice for is named under `left_out`.
    """
    inputs = inputs_of(operator, place, dtype, device)
    label = {
        "operator": operator.name,
        "place": place.name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows: list[dict[str, Any]] = [
        {
            **label,
            "pass": name,
            "least_bytes": size,
            **{figure: {} for figure in ("ms", "host_ms", "peak_mib", "left_out")},
        }
        for name, size in zip(
            ("forward", "backward"), operator.least_bytes(place, dtype.itemsize), strict=True
        )
    ]
    leaves = [inputs[name] for name in operator.differentiable]
    for name, form in forms_of(operator, compile_with=None):
        if deadline.passed:
            for row in rows:
                row["left_out"][name] = "time was up"
            continue
        try:
            # A form that does not read an input, as a replaced one may not, has no gradient for it.
            outputs = form(inputs, place)
            differentiable = [y for y in outputs if y.requires_grad]
            upstream = upstream_of(differentiable)
            runs = (
                lambda form=form: form(inputs, place),
                lambda y=differentiable, g=upstream: torch.autograd.grad(
                    y, leaves, g, retain_graph=True, allow_unused=True
                ),
            )
            for row, run in zip(rows, runs, strict=True):
                row["ms"][name] = median_ms(run, device)
                row["host_ms"][name] = host_ms(run)
                row["peak_mib"][name] = peak_mib(run, device)
        except torch.OutOfMemoryError:
            for row in rows:
                row["left_out"][name] = "out of memory"
    for row in rows:
        _add_ratios(row, bandwidth)
    return rows


def _add_ratios(row: dict[str, Any], bandwidth: float | None) -> None:
    """Times over the kernel's, and the kernel's over the least time for its bytes."""
    kernel = row["ms"].get("kernel")
    if kernel is None:
        return
    row["over_kernel"] = {
        name: value / kernel for name, value in row["ms"].items() if name != "kernel"
    }
    if bandwidth is not None:
        floor = 1000 * row["least_bytes"] / bandwidth
        row["floor_ms"] = floor
        row["over_floor"] = kernel / floor
        row["share_of_peak"] = floor / kernel
