"""A GPU driver without a GPU: lets Triton compile and look up kernels for a device elsewhere.

Used by the kernel builder, by the static checks and by tests, never by a training process.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


def target_of(arch: str) -> GPUTarget:
    """Triton's target for an architecture: `sm90` and so on from NVIDIA, `gfx942` from AMD."""
    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)
    return GPUTarget("hip", arch, 64)


class StubDriver:
    """What the JIT asks of a driver, for one architecture; a launch is written down and not run.

    Args:
        arch: as for `target_of`.
    """

    def __init__(self, arch: str) -> None:
        self.target = target_of(arch)
        self.utils = self
        self.launches: list[str] = []
        """Names of the launched kernels, in order."""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        # Larger than on any device: what fits is checked where the numbers are read.
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 1}

    def load_binary(self, *_arguments: Any) -> tuple[object, object, int, int, int]:
        """Module, function, registers, spills and threads of a kernel that nobody will run."""
        return object(), object(), 0, 0, 1024

    def unload_module(self, _module: object) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, _source: object, metadata: Any) -> Any:
        return lambda *_arguments: self.launches.append(metadata.name)


def install_stub_driver(arch: str) -> StubDriver:
    """Make a stub the active driver for the rest of the process.

    For good, since every kernel remembers the device that it was first compiled for.
    """
    stub = StubDriver(arch)
    driver.set_active(stub)
    return stub
