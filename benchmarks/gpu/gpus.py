"""Named GPUs: what their makers state, and what follows for a kernel."""

from __future__ import annotations

from dataclasses import dataclass


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
        """Warp instructions that it can issue while one byte comes from memory.

        A processor issues four a clock. A kernel that needs more is bound by issue, not by memory;
        somewhat below, the two get into each other's way.
        """
        return 4 * self.processors * self.clock / self.bandwidth

    def floor(self, moved: float) -> float:
        """The least time for moving some bytes, in seconds."""
        return moved / self.bandwidth


GPUS = (
    Gpu("A100 SXM 80GB", "sm80", 2.039e12, 312e12, 108, 1.41e9, 1024),
    Gpu("H100 SXM", "sm90", 3.35e12, 989e12, 132, 1.98e9, 2048),
    Gpu("H200", "sm90", 4.8e12, 989e12, 132, 1.98e9, 2048),
    Gpu("B200", "sm100", 8.0e12, 2250e12, 148, 1.965e9, 4096),
    Gpu("MI300X", "gfx942", 5.3e12, 1307e12, 304, 2.1e9, 1024),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver's device name means, such as `NVIDIA H200`; None if it is not here."""
    words = device_name.upper().replace("-", " ").split()
    # The slower cards of the same name.
    if "PCIE" in words or "40GB" in words:
        return None
    return next((gpu for gpu in GPUS if gpu.name.upper().split()[0] in words), None)
