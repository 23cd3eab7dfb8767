"""A driver of Triton that runs compiled kernels on the CPU, and lets the project launch them.

Grid, specialisation, launch rows and compiled code are those of a GPU of the architecture; what
lacks is the GPU's own assembler, whose output is not made.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# The interpreter off, and a cache of compiled kernels that no GPU reads: they lack their code.
os.environ["TRITON_INTERPRET"] = "0"
os.environ["CODED_RESNEXT_KERNELS"] = ""
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).parents[2] / "build" / "ptx")

import numpy as np
import torch
from ptx.memory import POISON, Fault, GlobalMemory, Storage
from ptx.numerics import Array, f4, f8, u1, u4, u8
from ptx.parser import Kernel, parse
from ptx.translate import accesses, run_grid
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from coded_resnext.kernels.build.steps import StubDriver

# Lanes that run together; NumPy's own costs are shared by them.
LANES = 1024
# Bytes that a program may have, by architecture.
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448}


class LaunchError(AssertionError):
    """A launch did what a GPU would not allow, or not do twice in the same way."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


@dataclass
class Launch:
    """A launch of a compiled kernel, before it is run."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    arguments: list[tuple[str, str, Any]]
    """Name, Triton's type and value of each; constants of the compiler are left out."""
    shared_bytes: int
    scratch_bytes: int
    shifts: dict[int, int] = field(default_factory=dict)
    """Bytes by which an argument's pointer lies before its tensor: the tensor is then the end of a
    larger one, which does not exist."""
    first: tuple[int, int, int] = (0, 0, 0)
    """The first program that runs; none before it does."""

    def run(self) -> list[Fault]:
        """Runs the programs; what the checks have seen."""
        if self.scratch_bytes:
            raise NotImplementedError(f"{self.name}: scratch memory")
        kernel = _parsed(self.ptx)
        granule = min(accesses(kernel, shared=False), default=16)
        memory = GlobalMemory(storages([(n, v) for n, _, v in self.arguments]), granule)
        numbers = [self._bits(index, memory) for index in range(len(self.arguments))]
        # Behind the arguments stand pointers to scratch memory, of which none was asked for.
        numbers += [0] * (len(kernel.parameters) - len(numbers))
        axes = [np.arange(low, high) for low, high in zip(self.first, self.grid, strict=True)]
        z, y, x = (axis.ravel() for axis in np.meshgrid(*axes[::-1], indexing="ij"))
        arguments = dict(zip(kernel.parameters, numbers, strict=True))
        faults = run_grid(
            kernel, arguments, memory, np.stack([x, y, z], 1), self.grid, self.shared_bytes, LANES
        )
        memory.copy_back()
        return faults

    def _bits(self, index: int, memory: GlobalMemory) -> int:
        _, kind, value = self.arguments[index]
        if isinstance(value, torch.Tensor):
            return memory.address_of(value.data_ptr()) - self.shifts.get(index, 0)
        if kind in ("fp32", "f32"):
            return int(f4(value).view(u4))
        return int(f8(value).view(u8)) if kind in ("fp64", "f64") else int(value)


@cache
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


def raw_bytes(address: int, size: int) -> Array:
    """The memory of this process, which stays that of its owner."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def initialised(data: Array, item: int) -> Array:
    """Which bytes hold something: elements, of bytes eight, that are poison hold nothing."""
    size = item if item > 1 else 8
    whole = data.size // size * size
    written = np.ones(data.size, bool)
    poison = np.resize(np.array(POISON, u1), size)
    written[:whole] = (data[:whole].reshape(-1, size) != poison).any(1).repeat(size)
    return written


def storages(tensors: list[tuple[str, Any]]) -> list[Storage]:
    """The storages that tensors lie in, each once."""
    groups: dict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, value in tensors:
        if isinstance(value, torch.Tensor) and value.numel():
            groups[value.untyped_storage().data_ptr()].append((name, value))
    result = []
    for address, group in groups.items():
        data = raw_bytes(address, group[0][1].untyped_storage().nbytes())
        spans = []
        for _, tensor in group:
            low = tensor.data_ptr() - address
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((low, low + (last + 1) * tensor.element_size()))
        written = initialised(data, max(tensor.element_size() for _, tensor in group))
        names = " and ".join(name for name, _ in group)
        result.append(Storage(names, address, data, spans, written))
    return result


def execute(launch: Launch) -> None:
    """Runs a launch.

    Raises:
        LaunchError: a check has seen something.
    """
    begin = time.perf_counter()
    faults = launch.run()
    RAN.append((launch.name, hash(launch.ptx), time.perf_counter() - begin))
    if faults:
        raise LaunchError(faults)


HANDLERS: list[Callable[[Launch], None]] = [execute]
"""Who gets the launches: the last one."""


@contextmanager
def launches_go_to(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Hands launches to another one than `execute` meanwhile."""
    HANDLERS.append(handler)
    try:
        yield
    finally:
        HANDLERS.pop()


RAN: list[tuple[str, int, float]] = []
"""Name, compiled code and seconds of each launch."""


class PtxDriver(StubDriver):
    """What the JIT asks of a GPU; launches go to `HANDLERS`."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.arch = arch
        self.compiled: dict[str, str] = {}
        """PTX by the hash of a kernel."""

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch], "multiprocessor_count": 4}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        scratch = getattr(metadata, "global_scratch_size", 0)

        def launch(x: int, y: int, z: int, *others: Any) -> None:
            # Stream, function, packed metadata, its hooks and their metadata come first.
            values = others[-len(names) :]
            arguments = [
                (name, source.signature[name], value)
                for name, value in zip(names, values, strict=True)
                if source.signature[name] != "constexpr"
            ]
            ptx = self.compiled[metadata.hash]
            HANDLERS[-1](Launch(metadata.name, ptx, (x, y, z), arguments, metadata.shared, scratch))

        return launch


def install(arch: str) -> PtxDriver:
    """Makes kernels run here as compiled for an architecture, for the rest of the process."""
    ptx = PtxDriver(arch)
    real = CompiledKernel._init_handles

    def keep(kernel: Any) -> None:
        ptx.compiled[kernel.metadata.hash] = kernel.asm["ptx"]
        real(kernel)

    CompiledKernel._init_handles = keep
    CUDABackend.make_cubin = lambda *_arguments: b"\0"
    driver.set_active(ptx)
    return ptx


def run_project_on(arch: str) -> None:
    """Makes the project take CPU tensors for those of a GPU of an architecture."""
    from coded_resnext.kernels import layout

    install(arch)
    # The code and not the name, which modules have imported from there.
    layout.interpreted.__code__ = (lambda: True).__code__
    layout.architecture_of.__code__ = (lambda x: ARCH).__code__  # type: ignore[name-defined]  # noqa: F821
    vars(layout)["ARCH"] = arch
