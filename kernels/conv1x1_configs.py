"""Launch settings of the 1x1 convolutions: one row for each specialised kernel, and the table that
says where the kernels are used.

The size of the map and of the batch are run-time numbers. No imports of PyTorch or Triton here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductSizes:
    """Static sizes of a 1x1 convolution."""

    inputs: int
    """`I`."""
    outputs: int
    """`O`."""
    join: bool = False
    """Whether its input is the sum that ends a residual block."""


@dataclass(frozen=True)
class Plan:
    """Who computes which pass of a 1x1 convolution."""

    passes: str
    """`forward`, `input`, `weight`: those that run kernels."""
    reason: str
    measured: bool = False
    """Whether it was timed, and not only predicted."""


def planned(arch: str, sizes: ProductSizes) -> Plan:
    """The line of the selection table for an architecture and a convolution."""
    return Plan("", f"no kernel is planned on {arch}")
