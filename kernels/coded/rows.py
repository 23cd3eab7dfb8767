"""Launch settings of the kernels for energies and Grams, kernels/coded/energy.py."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from coded_resnext.kernels.rows import (
    ITEM_BYTES,
    Argument,
    CodedSizes,
    LaunchRow,
    Variant,
    Windows,
    block_pixels,
    next_power_of_2,
    triton_release,
    tuned,
    with_registers,
)

# Samples that share one load of the branch matrices and of the affine map.
SAMPLES_PER_PROGRAM = 8


def _energy_row(
    kernel: str,
    args: tuple[Argument, ...],
    sizes: CodedSizes,
    variant: Variant,
    pixels: dict[int, int],
    passes: int,
    samples: int = SAMPLES_PER_PROGRAM,
) -> LaunchRow:
    """Returns a kernel over (samples, windows): one warp a window, since more would repeat its
    product.

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
            ("SAMPLES", samples),
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
def energy_forward(sizes: CodedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `energy.energy_forward`: 64 pixels keep several wide loads in flight.

    In float32 32 do, and where products are unrolled for sm100, 64 would spill.
    """
    return _energy_row(
        "coded.energy:energy_forward",
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
def energy_backward(sizes: CodedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `energy.energy_backward`: smaller tiles, for the registers of its
    sums."""
    return _energy_row(
        "coded.energy:energy_backward",
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
def weighted_gram(sizes: CodedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `energy.weighted_gram`: the forward pass with a second matrix to
    keep.

    For sm100 the compiler spills tiles of 32 by 32. Windows of 16 channels have half the samples of
    a program, so that twice as many programs wait; of wider ones the partial sums would be as many
    bytes as the activations.
    """
    samples = SAMPLES_PER_PROGRAM // 2 if Windows.of(sizes).block_k == 16 else SAMPLES_PER_PROGRAM
    return _energy_row(
        "coded.energy:weighted_gram",
        ("*fp32", variant.pointer(), *variant.affine_map, "*fp32", 256),
        sizes,
        variant,
        {16: 64, 32: 16 if variant.arch == "sm100" else 32},
        passes=1,
        samples=samples,
    )


def _aggregate_constexprs(
    sizes: CodedSizes, variant: Variant, windows: int, block_p: int
) -> tuple[tuple[str, int | str], ...]:
    cut = Windows.of(sizes)
    return (
        *cut.constexprs(sizes, windows=windows, block_p=block_p),
        ("STEPS", -(-cut.count // windows)),
        ("BRANCHES_P", next_power_of_2(sizes.branches)),
        ("PRECISION", variant.precision),
    )


def _windows_per_program(sizes: CodedSizes) -> int:
    """Windows that a program of `aggregate` holds at once: eight, or four where fewer idle; one of
    64 channels."""
    cut = Windows.of(sizes)
    if cut.block_k > 32:
        return 1
    if cut.count <= 4:
        return next_power_of_2(cut.count)
    return min((8, 4), key=lambda windows: -(-cut.count // windows) * windows)


def _shared_tile(variant: Variant, backward: bool) -> tuple[int, int]:
    """Returns the most pixels of a window of 64 channels, and the warps that share it.

    In float32 the compiler keeps to 64 registers. For sm100 it takes 64 rows and four warps to its
    tensor memory, from which the forward kernel spills and the backward one issues more.
    """
    if variant.dtype == "fp32":
        return 32, 8
    if variant.arch == "sm100":
        return (32, 4) if backward else (64, 2)
    return 64, 4


def _row(sizes: CodedSizes, variant: Variant, windows: int, backward: bool = False) -> LaunchRow:
    """Returns the forward row, or what the backward one takes over: a program a sample, a warp a
    window of 16 pixels where several warps do not share one."""
    cut = Windows.of(sizes)
    block_p, warps = 16, windows
    if cut.block_k > 32:
        pixels, warps = _shared_tile(variant, backward)
        block_p = block_pixels(sizes, pixels)
    item = ITEM_BYTES[variant.dtype]
    return LaunchRow(
        kernel="coded.aggregate:aggregate_forward",
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
def aggregate_forward(sizes: CodedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `aggregate.aggregate_forward`."""
    row = _row(sizes, variant, _windows_per_program(sizes))
    if (triton_release(), variant.arch) == ("3.7", "sm90") and row.num_warps == 8:
        # Its compiler stops at 40 registers of the 62 that it needs, and keeps one in memory.
        row = replace(row, registers=128)
    return tuned(row, variant.arch)


@cache
def aggregate_backward(sizes: CodedSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `aggregate.aggregate_backward`: the rules are those of the forward
    pass.

    But for float32, of which eight windows would spill.
    """
    windows = _windows_per_program(sizes)
    most = min(windows, 4) if variant.dtype == "fp32" else windows
    forward = _row(sizes, variant, most, backward=True)
    row = replace(
        forward,
        kernel="coded.aggregate:aggregate_backward",
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
