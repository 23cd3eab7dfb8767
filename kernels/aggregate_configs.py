"""Launch settings of the kernels that scale the branches, aggregate.py."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from .configs import (
    ITEM_BYTES,
    BlockSizes,
    LaunchRow,
    Variant,
    Windows,
    block_pixels,
    next_power_of_2,
)
from .tuned import tuned


def _aggregate_constexprs(
    sizes: BlockSizes, variant: Variant, windows: int, block_p: int
) -> tuple[tuple[str, int | str], ...]:
    cut = Windows.of(sizes)
    return (
        *cut.constexprs(sizes, windows=windows, block_p=block_p),
        ("STEPS", -(-cut.count // windows)),
        ("BRANCHES_P", next_power_of_2(sizes.branches)),
        ("PRECISION", variant.precision),
    )


def _windows_per_program(sizes: BlockSizes) -> int:
    """Windows that a program of `aggregate` holds at once: eight, or four where fewer idle.

    One of 64 channels.
    """
    cut = Windows.of(sizes)
    count = cut.count
    if cut.block_k > 32:
        return 1
    if count <= 4:
        return next_power_of_2(count)
    return min((8, 4), key=lambda windows: -(-count // windows) * windows)


def _forward(sizes: BlockSizes, variant: Variant, windows: int) -> LaunchRow:
    """A program a sample, a warp a window of 16 pixels.

    One of 64 channels is shared by four warps and as large as four others; in float32, where the
    compiler keeps to 64 registers, by eight, and half as large.
    """
    cut = Windows.of(sizes)
    block_p, warps = 16, windows
    if cut.block_k > 32:
        most, warps = (32, 8) if variant.dtype == "fp32" else (64, 4)
        block_p = block_pixels(sizes, most)
    item = ITEM_BYTES[variant.dtype]
    return LaunchRow(
        kernel="aggregate:aggregate_forward",
        args=(
            variant.pointer(),
            "*fp32",
            "*fp32",
            "*fp32",
            variant.pointer(),
            *variant.affine_map,
            "*fp32",
            variant.pointer(variant.drop, "fp32"),
            variant.pointer(variant.keep, "fp32"),
            0.5,
        ),
        constexprs=_aggregate_constexprs(sizes, variant, windows, block_p),
        num_warps=warps,
        trip_bytes=windows * block_p * cut.group * sizes.width * item,
        sample_bytes=sizes.branches * (2 * sizes.width * sizes.pixels * item + 8),
    )


@cache
def aggregate_forward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `aggregate.aggregate_forward`."""
    return tuned(_forward(sizes, variant, _windows_per_program(sizes)), variant.arch)


@cache
def aggregate_backward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `aggregate.aggregate_backward`: the rules are those of the forward pass.

    But for float32, of which eight windows would spill.
    """
    windows = _windows_per_program(sizes)
    forward = _forward(sizes, variant, min(windows, 4) if variant.dtype == "fp32" else windows)
    row = replace(
        forward,
        kernel="aggregate:aggregate_backward",
        args=(
            variant.pointer(),
            variant.pointer(variant.affine, "fp32"),
            "*fp32",
            variant.pointer(),
            variant.pointer(),
            *variant.affine_map,
            "*fp32",
            variant.pointer(variant.drop, "fp32"),
            variant.pointer(variant.keep, "fp32"),
            "*fp32",
            "*fp32",
            "*fp32",
            0.5,
        ),
        trip_bytes=3 * forward.trip_bytes,
        sample_bytes=sizes.branches
        * (3 * sizes.width * sizes.pixels * ITEM_BYTES[variant.dtype] + 12),
    )
    return tuned(row, variant.arch)
