"""Launch settings of the 1x1 convolutions: one row for each specialised kernel, and the table that
says where the kernels are used.

The size of the map and of the batch are run-time numbers. No imports of PyTorch or Triton here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from coded_resnext.kernels.rows import (
    ALL_PASSES,
    ITEM_BYTES,
    NO_PASSES,
    Argument,
    LaunchRow,
    Passes,
    Plan,
    Variant,
    next_power_of_2,
    triton_release,
)


@dataclass(frozen=True)
class ProductSizes:
    """Static sizes of a 1x1 convolution."""

    inputs: int
    """`I`."""
    outputs: int
    """`O`."""
    join: bool = False
    """Says whether its input is the sum that ends a residual block."""


@dataclass(frozen=True)
class Tile:
    """The tile of a program, and what it takes to work on it."""

    m: int
    """Rows: pixels, or output channels for the gradient of the weight."""
    k: int
    """What is summed over in one step: channels, or pixels for the gradient of the weight."""
    n: int
    """Columns: channels of the result."""
    warps: int
    stages: int = 1
    programs: int = 1
    """Programs that a processor holds at a time."""
    registers: int = 0
    """The most of a thread, where the compiler would take more; 0: as many as it takes."""


# float32 products have no tensor cores that keep their precision; small tiles serve checks.
_SINGLE = Tile(m=32, k=32, n=64, warps=4, programs=4)
SINGLE_WEIGHT = Tile(m=64, k=32, n=64, warps=4, programs=2)
# Channels of a weight's longer side up to which a block of it stays with a program.
_RESIDENT = 256


def fitted(tile: Tile, rows: int, columns: int) -> Tile:
    """Returns a tile no larger than what there is, and no smaller than a product of tensor
    cores."""
    m = tile.m if rows == 0 else min(tile.m, max(16, next_power_of_2(rows)))
    n = min(tile.n, max(16, next_power_of_2(columns)))
    return replace(tile, m=m, n=n)


def map_tile(reduced: int, columns: int, variant: Variant) -> Tile:
    """Returns the tile of a pass over the pixels that sums over channels, given the sizes of the
    weight."""
    if variant.dtype == "fp32":
        k = min(_SINGLE.k, max(16, next_power_of_2(reduced)))
        return fitted(replace(_SINGLE, k=k), 0, columns)
    resident = max(reduced, columns) <= _RESIDENT and reduced * columns <= 128 * 256
    k = max(16, next_power_of_2(reduced)) if resident else 64
    tile = Tile(m=64, k=k, n=256, warps=8, stages=2)
    return fitted(tile, 0, columns)


def _weight_tile(sizes: ProductSizes, variant: Variant) -> Tile:
    tile = Tile(m=128, k=64, n=128, warps=8, stages=2, programs=2)
    single = variant.dtype == "fp32"
    return fitted(SINGLE_WEIGHT if single else tile, sizes.outputs, sizes.inputs)


def row_of(
    kernel: str,
    tensors: tuple[Argument, ...],
    sizes: ProductSizes,
    variant: Variant,
    tile: Tile,
    wide: float,
    narrow: float,
    *,
    backward: bool = False,
) -> LaunchRow:
    """Returns a row of one of the kernels.

    Args:
        kernel: `module:function`.
        tensors: the pointers in the order of the signature.
        sizes, variant, tile: what it is compiled for.
        wide: tensors of the batch with `I` channels that it reads or writes.
        narrow: those with `O`.
        backward: whether it is a gradient of the input.
    """
    item = ITEM_BYTES[variant.dtype]
    pixel_bytes = int(item * (wide * sizes.inputs + narrow * sizes.outputs))
    pixels, steps = tile.m, -(-(sizes.outputs if backward else sizes.inputs) // tile.k)
    columns = -(-(sizes.inputs if backward else sizes.outputs) // tile.n)
    if "weight" in kernel:
        pixels, steps = tile.k, 1
        columns = -(-sizes.outputs // tile.m) * -(-sizes.inputs // tile.n)
    return LaunchRow(
        kernel=kernel,
        args=(*tensors, 4096),
        constexprs=(
            ("INPUTS", sizes.inputs),
            ("OUTPUTS", sizes.outputs),
            ("BLOCK_M", tile.m),
            ("BLOCK_K", tile.k),
            ("BLOCK_N", tile.n),
            ("PRECISION", variant.precision),
        ),
        num_warps=tile.warps,
        num_stages=tile.stages,
        registers=tile.registers,
        # A tensor that several columns of tiles read counts once.
        trip_bytes=pixels * pixel_bytes // columns,
        steps=steps,
        sample_bytes=EXAMPLE_PIXELS * pixel_bytes,
    )


# Where in bfloat16 another tile leaves an H100 less to wait for: two programs on a processor, or a
# weight that stays with its program instead of being read again for every tile; docs/kernels.md
# has the counts.
TILES = {
    ("sm90", "product_join", 128, 256): Tile(32, 128, 256, 8, 2, programs=2, registers=128),
    ("sm90", "product_join", 256, 512): Tile(64, 256, 256, 8, 2),
    ("sm90", "product_forward", 256, 128): Tile(32, 256, 128, 8, 2, programs=2),
    ("sm90", "product_forward", 256, 256): Tile(32, 256, 128, 8, 2, programs=2),
    ("sm90", "product_forward", 512, 256): Tile(128, 64, 256, 8, 3),
    ("sm90", "join_input_gradient", 256, 128): Tile(32, 128, 256, 8, 2, programs=2, registers=128),
    ("sm90", "join_input_gradient", 256, 256): Tile(32, 256, 128, 8, 2, programs=2, registers=128),
    ("sm90", "join_input_gradient", 512, 256): Tile(32, 256, 128, 8, 2, programs=2, registers=128),
}


# What would keep registers in memory by one release of Triton: two programs of a join's gradient,
# by its input channels, and a tile of 128 rows.
_ALONE = {("3.7", 512), ("3.9", 256), ("3.9", 512)}
_SMALLER = {("3.9", 128)}


def tile_of(kernel: str, sizes: ProductSizes, variant: Variant) -> Tile:
    """Returns the tile of a kernel over the pixels, by the name of its function."""
    release = triton_release()
    own = TILES.get((variant.arch, kernel, sizes.inputs, sizes.outputs))
    if own is not None and variant.dtype == "bf16" and (release, own.m) not in _SMALLER:
        # The maps of a written join take more registers than two programs leave.
        wide = variant.raw or variant.affine or (release, sizes.inputs) in _ALONE
        alone = kernel == "join_input_gradient" and wide
        return replace(own, programs=1, registers=0) if alone else own
    if not kernel.endswith("gradient"):
        return map_tile(sizes.inputs, sizes.outputs, variant)
    tile = map_tile(sizes.outputs, sizes.inputs, variant)
    # Beside the tile of the product stand up to four maps, which with 64 rows would spill; one of
    # the moments does so for sm100, where all output channels are one step.
    one_map = kernel == "moments_input_gradient"
    is_one_step = tile.k >= sizes.outputs and variant.arch == "sm100"
    return tile if one_map and not is_one_step else replace(tile, m=min(tile.m, 32))


def weight_tile(sizes: ProductSizes, variant: Variant) -> Tile:
    """Returns the tile of the kernel for the gradient of the weight."""
    return _weight_tile(sizes, variant)


# The map that sizes in bytes are stated for.
EXAMPLE_PIXELS = 1600


@cache
def forward(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `forward.product_forward`."""
    vector = "*fp32" if variant.affine else None
    tensors = (
        variant.pointer(),
        "*fp32" if variant.statistics else None,
        variant.pointer(),
        vector,
        vector,
        variant.pointer(),
    )
    tile = tile_of("product_forward", sizes, variant)
    return row_of(
        "conv1x1.forward:product_forward", tensors, sizes, variant, tile, wide=1, narrow=1
    )


@cache
def join_forward(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `forward.join_forward`."""
    vector = "*fp32" if variant.affine else None
    tensors = (
        variant.pointer(),
        "*u8" if variant.signs else None,
        variant.pointer(),
        "*fp32" if variant.statistics else None,
        variant.pointer(),
        "*fp32",
        "*fp32",
        variant.pointer(),
        vector,
        vector,
        variant.pointer(),
    )
    tile = tile_of("join_forward", sizes, variant)
    wide = 3 + variant.signs / 8 / ITEM_BYTES[variant.dtype]
    return row_of("conv1x1.forward:join_forward", tensors, sizes, variant, tile, wide, narrow=1)


def _output_gradient(variant: Variant) -> tuple[tuple[Argument, ...], int]:
    """Returns the pointers around the gradient of the output, and how many tensors of its size they
    are."""
    vector = "*fp32" if variant.statistics else None
    pointers = (
        variant.pointer(),
        variant.pointer(variant.statistics),
        "*fp32" if variant.gain else None,
        vector,
        vector,
    )
    return pointers, 1 + variant.statistics + variant.output_gradient


@cache
def input_gradient(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `backward.product_input_gradient`."""
    vector = "*fp32" if variant.affine else None
    pointers, narrow = _output_gradient(variant)
    tensors = (
        variant.pointer(),
        variant.pointer(variant.output_gradient),
        vector,
        *pointers,
        variant.pointer(variant.affine),
        vector,
        vector,
        variant.pointer(),
    )
    kernel = "conv1x1.backward:product_input_gradient"
    tile = tile_of("product_input_gradient", sizes, variant)
    wide = 1 + variant.affine
    return row_of(kernel, tensors, sizes, variant, tile, wide, narrow, backward=True)


@cache
def join_input_gradient(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `backward.join_input_gradient`."""
    pointers, narrow = _output_gradient(variant)
    tensors = (
        variant.pointer(),
        variant.pointer(variant.output_gradient),
        "*fp32",
        *pointers,
        variant.pointer(variant.joined),
        variant.pointer(not variant.signs),
        "*u8" if variant.signs else None,
        variant.pointer(variant.raw),
        variant.pointer(variant.affine),
        variant.pointer(),
    )
    kernel = "conv1x1.backward:join_input_gradient"
    tile = tile_of("join_input_gradient", sizes, variant)
    mask = 1 / 8 / ITEM_BYTES[variant.dtype] if variant.signs else 1
    wide = 1 + variant.joined + variant.raw + variant.affine + mask
    return row_of(kernel, tensors, sizes, variant, tile, wide, narrow, backward=True)


@cache
def weight_gradient(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `backward.product_weight_gradient`."""
    vector = "*fp32" if variant.affine else None
    tensors = ("*fp32", variant.pointer(), variant.pointer(), vector, vector)
    kernel = "conv1x1.backward:product_weight_gradient"
    return row_of(kernel, tensors, sizes, variant, weight_tile(sizes, variant), wide=1, narrow=1)


# The selection table: where kernels are worth their launch. Nothing was timed yet. The prediction
# is of microseconds on an H200 for a batch of 256 images of 160 pixels in bfloat16: kernel, and in
# its place cuBLAS, one pass over the maps and one for the sums. By channels in and out.
CONVOLUTIONS = {
    (128, 256): Plan(ALL_PASSES, "predicted: forward 114 for 199, input 220 for 332"),
    (256, 512): Plan(ALL_PASSES, "predicted: forward 88 for 102, input 137 for 169"),
}
# The gradient of a join's weight is a product of two maps as they are, which cuBLAS has.
_NOT_WEIGHT = Passes(forward=True, input=True)
JOINS = {
    (256, 128): Plan(_NOT_WEIGHT, "predicted: forward 190 for 278, input 255 for 438"),
    (256, 256): Plan(_NOT_WEIGHT, "predicted by its neighbours, at either end of the stage"),
    (512, 256): Plan(_NOT_WEIGHT, "predicted: forward 118 for 142, input 163 for 222"),
}
WIDER = Plan(NO_PASSES, "predicted: from 1024 channels on cuBLAS is as fast, 92 to 90 and 70 to 82")
OTHERS = Plan(NO_PASSES, "not predicted")
# What has been compiled without a register in memory, by architecture: elements of the largest
# weight, and passes. On sm80 the gradient of the input spills 4416 instructions. The interpreter
# takes all.
COMPILED = {
    "sm80": (128 * 256, Passes(forward=True, weight=True)),
    "sm90": (512 * 256, ALL_PASSES),
    "sm100": (512 * 256, ALL_PASSES),
    "cpu": (512 * 256, ALL_PASSES),
}


def planned(arch: str, sizes: ProductSizes) -> Plan:
    """Returns the line of the selection table for an architecture and a convolution."""
    if arch not in COMPILED:
        return Plan(NO_PASSES, f"the kernels have no settings for {arch}")
    other = WIDER if max(sizes.inputs, sizes.outputs) >= 1024 else OTHERS
    plan = (JOINS if sizes.join else CONVOLUTIONS).get((sizes.inputs, sizes.outputs), other)
    largest, compiled = COMPILED[arch]
    if any(plan.passes) and sizes.inputs * sizes.outputs > largest:
        return Plan(NO_PASSES, f"the kernels for weights of this size were not compiled for {arch}")
    return Plan(plan.passes.within(compiled), plan.reason, plan.measured.within(compiled))


# Where the ImageNet network has the convolutions of the table; the join at the end of a stage's
# first block has a residual with a map.
PAPER_CONVOLUTIONS = {"32x4d c2": (128, 256), "32x4d c3": (256, 512)}
PAPER_JOINS = {
    "32x4d c2 mapped": (256, 128),
    "32x4d c2 identity": (256, 128),
    "32x4d c2 to c3 identity": (256, 256),
    "32x4d c3 mapped": (512, 256),
    "32x4d c3 identity": (512, 256),
}


def operator_rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Yields the rows that the operators launch for these layers in bfloat16, where BatchNorm has
    its statistics from the output. Steps of training launch those of kernels/recompute/rows.py."""
    # The gradient of what ends a block comes without its factor.
    between = Variant(affine=True, statistics=True, gain=True, output_gradient=True, arch=arch)
    for stage, (inputs, outputs) in PAPER_CONVOLUTIONS.items():
        sizes = ProductSizes(inputs, outputs)
        passes = planned(arch, sizes).passes
        for runs, make in ((passes.forward, forward), (passes.input, input_gradient)):
            if runs:
                row = make(sizes, between)
                yield f"1x1 {row.kernel.split(':')[1]} {stage}", row
    for stage, (inputs, outputs) in PAPER_JOINS.items():
        sizes = ProductSizes(inputs, outputs, join=True)
        passes = planned(arch, sizes).passes
        mapped = stage.endswith("mapped")
        variant = replace(between, affine=mapped, gain=False, signs=passes.input)
        for runs, make in ((passes.forward, join_forward), (passes.input, join_input_gradient)):
            if runs:
                row = make(sizes, variant)
                yield f"1x1 {row.kernel.split(':')[1]} {stage}", row
