"""Launch settings of the fused branch sum, kernels/coded/expand_kernel.py."""

from __future__ import annotations

from functools import cache

from coded_resnext.kernels.rows import (
    ITEM_BYTES,
    BlockSizes,
    LaunchRow,
    Variant,
    block_pixels,
    next_power_of_2,
    tuned,
)


def _expand_block_k(variant: Variant) -> int:
    return 32 if variant.dtype == "fp32" else 64


def takes_energy(sizes: BlockSizes, variant: Variant) -> bool:
    """Whether `expand_forward` can take energies: branches must tile its blocks of channels."""
    return _expand_block_k(variant) % sizes.width == 0


@cache
def expand_forward(
    sizes: BlockSizes,
    variant: Variant,
    *,
    sums: bool = False,
    energy: bool = False,
    factor: bool = False,
) -> LaunchRow:
    """Settings of `expand.expand_forward`.

    Args:
        sums: whether sums of `y` and `y^2` are asked for.
        energy: whether energies are taken from the tiles; needs `takes_energy`.
        factor: whether samples are scaled.

    A tile has 128 rows of 64 channels. Where there is a prologue, 256 output channels share its
    work; compiled code for other architectures than sm90 has the registers for 128.
    """
    single = variant.dtype == "fp32"
    rows = 64 if single else 128
    block_p = block_pixels(sizes, rows)
    samples = rows // block_p
    block_k = _expand_block_k(variant)
    prologue = variant.affine or variant.drop or variant.keep
    wide = not single and prologue and variant.arch == "sm90"
    block_c = min(256 if wide else 64 if single else 128, next_power_of_2(max(16, sizes.channels)))
    item = ITEM_BYTES[variant.dtype]
    channels = sizes.branches * sizes.width
    row = LaunchRow(
        kernel="coded.expand_kernel:expand_forward",
        args=(
            variant.pointer(),
            variant.pointer(sums, "fp32"),
            variant.pointer(energy, "fp32"),
            variant.pointer(),
            *variant.affine_map,
            variant.pointer(),
            variant.pointer(energy, "fp32"),
            variant.pointer(variant.drop, "fp32"),
            variant.pointer(variant.keep, "fp32"),
            variant.pointer(factor, "fp32"),
            256,
        ),
        constexprs=(
            ("BRANCHES", sizes.branches),
            ("WIDTH", sizes.width),
            ("PIXELS", sizes.pixels),
            ("CHANNELS_OUT", sizes.channels),
            ("SAMPLES", samples),
            ("BLOCK_P", block_p),
            ("BLOCK_C", block_c),
            ("BLOCK_K", block_k),
            ("PRECISION", variant.precision),
        ),
        num_warps=4 if single else 8,
        num_stages=2,
        trip_bytes=(rows + block_c) * block_k * item,
        sample_bytes=(channels + sizes.channels) * sizes.pixels * item,
    )
    return tuned(row, variant.arch)
