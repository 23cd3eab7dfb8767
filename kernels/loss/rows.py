"""Launch settings of the coding losses, kernels/loss/kernel.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from coded_resnext.kernels.rows import LaunchRow, next_power_of_2


@dataclass(frozen=True)
class LossSizes:
    """Static sizes of a coding loss."""

    branches: int
    classes: int
    soft: bool = False
    """Says whether targets are probabilities."""
    exponent: float = 4.0
    decode: bool = False
    """Says whether classes are read off the energies too."""


@cache
def coding_loss(sizes: LossSizes) -> LaunchRow:
    """Returns the settings of `loss.coding_loss`: small tiles, since a batch has few samples.

    Without fused multiplications and additions: they put one of the powers of a sum unrounded into
    the other's addition, so that lanes that add the same two numbers come to different sums, and
    which of them is stored is not defined. A repeated loss would differ in its last bit.
    """
    branches = max(16, next_power_of_2(sizes.branches))
    return LaunchRow(
        kernel="loss.kernel:coding_loss",
        args=(
            "*fp32",
            "*fp32",
            "*i64" if sizes.decode else None,
            "*fp32",
            "*u8",
            "*fp32" if sizes.soft else "*i64",
            "*fp32",
            0.5,
            256,
        ),
        constexprs=(
            ("BRANCHES", sizes.branches),
            ("BRANCHES_P", branches),
            ("CLASSES", sizes.classes),
            ("SOFT", sizes.soft),
            ("EXPONENT", float(sizes.exponent)),
            ("BLOCK_B", 16),
            ("BLOCK_K", 64),
        ),
        num_warps=4,
        enable_fp_fusion=False,
        trip_bytes=0,
        sample_bytes=sizes.branches * 9 + 12,
    )
