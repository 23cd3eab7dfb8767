"""Launch settings of the kernels for a 1x1 convolution at the end of a residual block whose output
is not stored: its BatchNorm has statistics from the moments of what is multiplied, or is folded
into the weight.

The size of the map and of the batch are run-time numbers. No imports of PyTorch or Triton here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from coded_resnext.kernels.batch_norm.rows import layer_arguments
from coded_resnext.kernels.conv1x1.rows import (
    EXAMPLE_PIXELS,
    PAPER_CONVOLUTIONS,
    PAPER_JOINS,
    SINGLE_WEIGHT,
    ProductSizes,
    Tile,
    fitted,
    forward,
    join_input_gradient,
    map_tile,
    planned,
    row_of,
    tile_of,
    weight_gradient,
)
from coded_resnext.kernels.rows import (
    ITEM_BYTES,
    Argument,
    Dtype,
    LaunchRow,
    Variant,
    triton_release,
)


@cache
def product_join(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `kernel.product_join`."""
    before = "*fp32" if variant.affine else None
    own = "*fp32" if variant.mapped else None
    tensors = (
        variant.pointer(),
        "*u8" if variant.signs else None,
        variant.pointer(),
        before,
        before,
        variant.pointer(),
        "*fp32" if variant.scaled else None,
        "*fp32",
        variant.pointer(variant.residual),
        own,
        own,
        "*fp32" if variant.factor else None,
    )
    tile = tile_of("product_join", sizes, variant)
    narrow = 1 + variant.residual + variant.signs / 8 / ITEM_BYTES[variant.dtype]
    kernel = "recompute.kernel:product_join"
    row = row_of(kernel, tensors, sizes, variant, tile, wide=1, narrow=narrow)
    return replace(row, args=(*row.args, EXAMPLE_PIXELS))


def moments_tile(channels: int, variant: Variant) -> Tile:
    """Returns the tile of the kernel for the moments, which has as many rows as columns."""
    # With 64 pixels in a step AMD's compiler keeps registers in memory.
    pixels = 32 if variant.arch.startswith("gfx") else 64
    tile = Tile(m=128, k=pixels, n=128, warps=8, stages=3)
    return fitted(SINGLE_WEIGHT if variant.dtype == "fp32" else tile, channels, channels)


def moments_blocks(channels: int, tile: Tile) -> int:
    """Returns the number of blocks of the scatter on and above its diagonal."""
    columns = -(-channels // tile.n)
    return columns * (columns + 1) // 2


@cache
def moments(channels: int, variant: Variant) -> LaunchRow:
    """Returns the settings of `moments.activation_moments`."""
    tile = moments_tile(channels, variant)
    vector = "*fp32" if variant.affine else None
    pixel_bytes = ITEM_BYTES[variant.dtype] * channels
    # TF32 alone would round away what makes small variances.
    precision = "tf32x3" if variant.tf32 else variant.precision
    return LaunchRow(
        kernel="recompute.moments:activation_moments",
        args=("*fp32", "*fp32", variant.pointer(), vector, vector, 4096),
        constexprs=(
            ("CHANNELS", channels),
            ("BLOCK_K", tile.k),
            ("BLOCK_N", tile.n),
            ("PRECISION", precision),
        ),
        num_warps=tile.warps,
        # With loads ahead Triton 3.6 stops at an assertion of its own on a B200's architecture.
        num_stages=1 if (triton_release(), variant.arch) == ("3.6", "sm100") else tile.stages,
        trip_bytes=tile.k * pixel_bytes // moments_blocks(channels, tile),
        sample_bytes=EXAMPLE_PIXELS * pixel_bytes,
    )


@cache
def moments_gradient(sizes: ProductSizes, variant: Variant) -> LaunchRow:
    """Returns the settings of `moments.moments_input_gradient`."""
    vector = "*fp32" if variant.affine else None
    tensors = (
        variant.pointer(),
        vector,
        variant.pointer(),
        variant.pointer(),
        variant.pointer(),
        "*fp32" if variant.dtype == "fp16" else None,
        "*fp32",
        variant.pointer(),
        vector,
        vector,
    )
    tile = tile_of("moments_input_gradient", sizes, variant)
    # Of the square matrix as much at a time as of the weight: all of it, or as long a step.
    resident = tile.k >= sizes.outputs
    step = map_tile(sizes.inputs, sizes.inputs, variant).k if resident else tile.k
    kernel = "recompute.moments:moments_input_gradient"
    row = row_of(kernel, tensors, sizes, variant, tile, wide=2, narrow=1, backward=True)
    steps = row.steps + -(-sizes.inputs // step) - 1
    return replace(row, constexprs=(*row.constexprs, ("BLOCK_H", step)), steps=steps)


# Rows of W of a program, and the sides of the blocks of its matrices.
MATRIX_ROWS = 16
MATRIX_STEP = 32
MATRIX_COLUMNS = 64
# Channels of a block of the scatter, and parts that are added at a time: of matrices, and of sums.
SCATTER_BLOCK = 16
SCATTER_PARTS = 16
SUMS_PARTS = 64


def scatter_grid(channels: int) -> tuple[int]:
    """Returns the grid of `matrices.merge_moments`."""
    return ((-(-channels // SCATTER_BLOCK)) ** 2,)


def outputs_grid(sizes: ProductSizes) -> tuple[int]:
    """Returns the grid of the kernels over rows of W."""
    return (-(-sizes.outputs // MATRIX_ROWS),)


def inputs_grid(sizes: ProductSizes) -> tuple[int]:
    """Returns the grid of `matrices.moments_gradients`."""
    return ((-(-sizes.inputs // MATRIX_STEP)) ** 2,)


def _matrices(kernel: str, args: tuple[Argument, ...], **constexprs: int | str) -> LaunchRow:
    return LaunchRow(
        kernel=f"recompute.matrices:{kernel}",
        args=args,
        constexprs=tuple(constexprs.items()),
        num_warps=4,
        trip_bytes=MATRIX_STEP * MATRIX_COLUMNS * 4,
        sample_bytes=0,
    )


@cache
def merge_moments(channels: int) -> LaunchRow:
    """Returns the settings of `matrices.merge_moments`."""
    return _matrices(
        "merge_moments",
        ("*fp32", "*fp32", "*fp32", "*fp32", 132, EXAMPLE_PIXELS),
        CHANNELS=channels,
        BLOCK_C=SCATTER_BLOCK,
        BLOCK_T=SCATTER_PARTS,
        BLOCK_S=SUMS_PARTS,
    )


@cache
def product_statistics(
    sizes: ProductSizes, dtype: Dtype, norm: tuple[bool, bool, bool] | None = (True, True, True)
) -> LaunchRow:
    """Returns the settings of `matrices.product_statistics`, for a weight in a dtype, and a layer
    that has what `batch_norm.rows.layer_arguments` asks for; without a layer for the statistics
    themselves."""
    results = ("*fp32", None, None) if norm is None else (None, "*fp32", "*fp32")
    matrices = (f"*{dtype}", "*fp32", "*fp32")
    layer = layer_arguments(*(norm or (False, False, False)))
    return _matrices(
        "product_statistics",
        ("*fp32", *results, *matrices, *layer, EXAMPLE_PIXELS),
        INPUTS=sizes.inputs,
        OUTPUTS=sizes.outputs,
        BLOCK_O=MATRIX_ROWS,
        BLOCK_K=MATRIX_STEP,
        BLOCK_N=MATRIX_STEP,
        PRECISION="ieee",
    )


@cache
def map_gradients(sizes: ProductSizes, dtype: Dtype) -> LaunchRow:
    """Returns the settings of `matrices.map_gradients`."""
    return _matrices(
        "map_gradients",
        ("*fp32", "*fp32", "*fp32", f"*{dtype}"),
        INPUTS=sizes.inputs,
        OUTPUTS=sizes.outputs,
        BLOCK_O=MATRIX_ROWS,
        BLOCK_N=MATRIX_COLUMNS,
    )


@cache
def weight_gradients(
    sizes: ProductSizes, dtype: Dtype, gradient: Dtype, *, norm: bool = True
) -> LaunchRow:
    """Returns the settings of `matrices.weight_gradients`, whose gradient has a dtype of its own,
    with those of BatchNorm or from them."""
    own = "*fp32" if norm else None
    given = None if norm else "*fp32"
    tensors = (f"*{gradient}", f"*{dtype}", own, "*fp32", f"*{dtype}", "*fp32", "*fp32")
    # Where a loop of one step is none, Triton 3.7's code for sm_90 keeps registers in memory, and
    # 3.6's does so with a loop.
    is_narrow = sizes.inputs <= MATRIX_COLUMNS or triton_release() == "3.6"
    row = _matrices(
        "weight_gradients",
        (*tensors, own, own, own, given, given, given, EXAMPLE_PIXELS),
        INPUTS=sizes.inputs,
        OUTPUTS=sizes.outputs,
        BLOCK_O=MATRIX_ROWS,
        BLOCK_N=MATRIX_COLUMNS // 2 if is_narrow else MATRIX_COLUMNS,
    )
    return replace(row, num_warps=2) if is_narrow else row


@cache
def moments_gradients(sizes: ProductSizes, dtype: Dtype) -> LaunchRow:
    """Returns the settings of `matrices.moments_gradients`; in float16 Q is scaled, and float32
    before."""
    square = "fp32" if dtype == "fp16" else dtype
    return _matrices(
        "moments_gradients",
        (f"*{square}", "*fp32", f"*{dtype}", "*fp32", "*fp32"),
        INPUTS=sizes.inputs,
        OUTPUTS=sizes.outputs,
        BLOCK_O=MATRIX_STEP,
        BLOCK_N=MATRIX_STEP,
        PRECISION="ieee",
    )


# The stage behind has no kernels, whose gradients would read signs.
LAST = ("32x4d c3",)
# The stage whose projection has the sizes of its last convolutions.
PROJECTED = ("32x4d c3",)
# Sizes of the convolutions that are not stored, and whether a map is before them, on every GPU.
PAPER_MOMENTS = {
    "32x4d c2": (ProductSizes(128, 256), True),
    "32x4d c3": (ProductSizes(256, 512), True),
    "32x4d c2 projection": (ProductSizes(64, 256), False),
    "32x4d c3 projection": (ProductSizes(256, 512), False),
}


def shipped_rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Yields every row of a 1x1 convolution that a step of training, or evaluation, in bfloat16
    launches."""
    for stage, (inputs, outputs) in PAPER_CONVOLUTIONS.items():
        sizes = ProductSizes(inputs, outputs)
        passes = planned(arch, sizes).passes
        trained = Variant(residual=True, affine=True, scaled=True, signs=passes.input, arch=arch)
        if passes.forward:
            ends = Variant(residual=True, arch=arch)
            yield f"1x1 product_join {stage} folded", product_join(sizes, ends)
            yield f"1x1 product_join {stage} identity", product_join(sizes, trained)
            mapped = replace(trained, mapped=True)
            yield f"1x1 product_join {stage} mapped", product_join(sizes, mapped)
            if trained.signs and stage in LAST:
                last = replace(trained, signs=False)
                yield f"1x1 product_join {stage} last", product_join(sizes, last)
        if passes.input:
            yield f"1x1 moments_input_gradient {stage}", moments_gradient(sizes, trained)
            if stage in PROJECTED:
                row = moments_gradient(sizes, replace(trained, affine=False))
                yield f"1x1 moments_input_gradient {stage} projection", row
        if passes.weight:
            yield f"1x1 product_weight_gradient {stage}", weight_gradient(sizes, trained)
    for stage, (sizes, affine) in PAPER_MOMENTS.items():
        row = moments(sizes.inputs, Variant(affine=affine, arch=arch))
        yield f"1x1 activation_moments {stage}", row
        for row in (
            merge_moments(sizes.inputs),
            product_statistics(sizes, "bf16"),
            weight_gradients(sizes, "bf16", "fp32"),
            moments_gradients(sizes, "bf16"),
        ):
            yield f"1x1 {row.kernel.split(':')[1]} {stage}", row
    # What stands behind such a join: a convolution of it as it is.
    behind = Variant(statistics=True, output_gradient=True, signs=True, raw=False, arch=arch)
    for stage, (inputs, outputs) in PAPER_JOINS.items():
        if not stage.endswith("identity"):
            continue
        passes = planned(arch, ProductSizes(inputs, outputs, join=True)).passes
        if passes.forward:
            row = forward(ProductSizes(inputs, outputs), Variant(statistics=True, arch=arch))
            yield f"1x1 product_forward {stage} behind a product_join", row
        if passes.input:
            row = join_input_gradient(ProductSizes(inputs, outputs, join=True), behind)
            yield f"1x1 join_input_gradient {stage} of a product_join", row
