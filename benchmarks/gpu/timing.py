"""What named GPUs can do by their data sheets, and how long a call takes on the one at hand.

On a GPU device time, as a CUDA graph, the second-level cache emptied before every run. On a CPU,
which only a dry run uses, PyTorch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU by its data sheet."""

    name: str
    arch: str
    bandwidth: float
    """Of its memory, bytes a second."""
    matrix_rate: float
    """Dense bf16 products on tensor cores, floating-point operations a second."""
    processors: int
    """Streaming multiprocessors."""
    clock: float
    """Highest clock of the processors, Hz."""
    products: int
    """bf16 multiply-accumulates of a processor in one clock, on tensor cores."""

    @property
    def issue_per_byte(self) -> float:
        """Returns the warp instructions that it can issue while one byte comes from memory.

        A processor issues four a clock. A kernel that needs more is bound by issue, not by memory;
        somewhat below, the two get into each other's way.
        """
        return 4 * self.processors * self.clock / self.bandwidth

    def floor(self, moved: float) -> float:
        """Returns the least time for moving some bytes, in seconds."""
        return moved / self.bandwidth


GPUS = (
    Gpu("A100 SXM 80GB", "sm80", 2.039e12, 312e12, 108, 1.41e9, 1024),
    Gpu("H100 SXM", "sm90", 3.35e12, 989e12, 132, 1.98e9, 2048),
    Gpu("H200", "sm90", 4.8e12, 989e12, 132, 1.98e9, 2048),
    Gpu("B200", "sm100", 8.0e12, 2250e12, 148, 1.965e9, 4096),
    Gpu("MI300X", "gfx942", 5.3e12, 1307e12, 304, 2.1e9, 1024),
)


def find_gpu(device_name: str) -> Gpu | None:
    """Returns the GPU that a driver's device name means, such as `NVIDIA H200`; None if it is not
    here."""
    words = device_name.upper().replace("-", " ").split()
    # The slower cards of the same name.
    if "PCIE" in words or "40GB" in words:
        return None
    return next((gpu for gpu in GPUS if gpu.name.upper().split()[0] in words), None)


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
    """Returns the median time of a call, milliseconds.

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
    """Returns the median time of a call within CUDA graphs of ten, milliseconds."""
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
    """Returns the milliseconds for which a call keeps the host busy."""
    start = time.perf_counter()
    for _ in range(10):
        run()
    return 100 * (time.perf_counter() - start)


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Returns the memory that a call adds at its peak, MiB; None where nobody counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
