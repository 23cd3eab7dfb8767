"""What compiled kernels may cost: one line for each kernel, checked by static.py.

A kernel without a line fails. A limit is the measured figure with little to spare, so that a change
which makes a kernel worse is seen; where a figure misses what was hoped for, the line says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton


@dataclass(frozen=True)
class Limits:
    """Of one kernel, for activations of two bytes on NVIDIA."""

    registers: int
    """Of a thread."""
    per_byte: float | None = None
    """Warp instructions for each byte that a sample costs in memory traffic; None: not memory
    that bounds it."""
    matrix: bool = True
    """Whether it must multiply on tensor cores."""
    wide_loads: bool = True
    """Whether most of its main loop's loads must be of 128 bits, where rows are aligned to them."""


LIMITS = {
    "energy_forward": Limits(registers=168, per_byte=0.17),
}

# Where another version of Triton needs another limit: (major.minor, kernel) to what differs.
BY_VERSION: dict[tuple[str, str], dict[str, float]] = {}


def limits_of(kernel: str) -> Limits | None:
    """The limits of a kernel under the Triton at hand; None where nobody has stated any."""
    limits = LIMITS.get(kernel)
    release = ".".join(triton.__version__.split(".")[:2])
    changes = BY_VERSION.get((release, kernel))
    return replace(limits, **changes) if limits is not None and changes else limits
