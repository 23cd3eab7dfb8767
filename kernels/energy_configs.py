"""Launch settings of the kernels for energies and Grams, energy.py."""

from __future__ import annotations

from functools import cache

from .configs import (
    ITEM_BYTES,
    Argument,
    BlockSizes,
    LaunchRow,
    Variant,
    Windows,
    block_pixels,
    with_registers,
)
from .tuned import tuned

# Samples that share one load of the branch matrices and of the affine map.
SAMPLES_PER_PROGRAM = 8


def _energy_row(
    kernel: str,
    args: tuple[Argument, ...],
    sizes: BlockSizes,
    variant: Variant,
    pixels: dict[int, int],
    passes: int,
) -> LaunchRow:
    """A kernel over (samples, windows): one warp a window, since more would repeat its product.

    Windows of 64 channels take two warps for their registers. `pixels` are the most pixels of a
    tile by the channels of a window, `passes` the tensors of the activations' size that are moved.
    """
    windows = Windows.of(sizes)
    block_p = block_pixels(sizes, pixels.get(windows.block_k, 16))
    item = ITEM_BYTES[variant.dtype]
    row = LaunchRow(
        kernel=kernel,
        args=args,
        constexprs=(
            *windows.constexprs(sizes, windows=1, block_p=block_p),
            ("SAMPLES", SAMPLES_PER_PROGRAM),
            ("PRECISION", variant.precision),
        ),
        num_warps=2 if windows.block_k > 32 else 1,
        trip_bytes=passes * block_p * windows.group * sizes.width * item,
        sample_bytes=sizes.branches * (passes * sizes.width * sizes.pixels * item + 4),
    )
    if kernel.endswith("backward"):
        row = with_registers(row, sizes, variant)
    return tuned(row, variant.arch)


@cache
def energy_forward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `energy.energy_forward`: 64 pixels keep several wide loads in flight.

    In float32 32 do, and where products are unrolled for sm100, 64 would spill.
    """
    return _energy_row(
        "energy:energy_forward",
        (
            "*fp32",
            variant.pointer(),
            *variant.affine_map,
            "*fp32",
            variant.pointer(variant.keep, "fp32"),
            0.5,
            256,
        ),
        sizes,
        variant,
        {16: 64, 32: 32 if variant.dtype == "fp32" else 64},
        passes=1,
    )


@cache
def energy_backward(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `energy.energy_backward`: smaller tiles, for the registers of its sums."""
    return _energy_row(
        "energy:energy_backward",
        (
            variant.pointer(),
            variant.pointer(variant.affine, "fp32"),
            variant.pointer(),
            *variant.affine_map,
            "*fp32",
            "*fp32",
            256,
        ),
        sizes,
        variant,
        {16: 32},
        passes=2,
    )


@cache
def weighted_gram(sizes: BlockSizes, variant: Variant) -> LaunchRow:
    """Settings of `energy.weighted_gram`: the forward pass with a second matrix to keep.

    For sm100 the compiler spills tiles of 32 by 32.
    """
    return _energy_row(
        "energy:weighted_gram",
        ("*fp32", variant.pointer(), *variant.affine_map, "*fp32", 256),
        sizes,
        variant,
        {16: 64, 32: 16 if variant.arch == "sm100" else 32},
        passes=1,
    )
