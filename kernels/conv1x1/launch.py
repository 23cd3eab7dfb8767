"""The 1x1 convolutions and their gradients by the Triton kernels: tensors in, tensors out.

Nothing is checked here. B samples, I channels in, O channels out, maps of H x W pixels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from coded_resnext.kernels.layout import (
    aligned,
    aligned_rows,
    as_float32,
    empty_float32,
    empty_rows,
    pixels_of,
    variant_of,
)

from . import rows as conv1x1_rows
from .rows import ProductSizes, Tile


def sizes_of(weight: Tensor, *, join: bool = False) -> ProductSizes:
    """Returns the sizes of a weight `[O, I, 1, 1]`, constants where a graph leaves sizes open."""
    return ProductSizes(int(weight.shape[1]), int(weight.shape[0]), join)


def forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns `y [B, O, H, W]`, channels-last, and its (count, sum, M2) in parts, `[parts, 3, O]`.

    Args:
        x: `[B, I, H, W]`; copied unless channels-last.
        weight: `[O, I, 1, 1]` in the dtype of `x`.
        scale, bias: `[I]` or None; `relu(scale x + bias)` is multiplied instead of `x`.
        statistics: whether they are wanted.
    """
    sizes = sizes_of(weight)
    variant = variant_of(x, affine=scale is not None, statistics=statistics)
    tile = conv1x1_rows.tile_of("product_forward", sizes, variant)
    rows, y = aligned_rows(x), empty_rows(x, sizes.outputs)
    parts, columns = parts_of(rows, tile, sizes.outputs)
    partial = empty_float32(x, parts, 3, sizes.outputs) if statistics else None
    conv1x1_rows.forward(sizes, variant).launch(
        (parts * columns,),
        y,
        partial,
        rows,
        as_float32(scale),
        as_float32(bias),
        aligned(weight),
        pixels_of(rows),
    )
    return y.permute(0, 3, 1, 2), partial


def join_forward(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    statistics: bool,
    keep_signs: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns `x = relu(scale y + bias + residual)`, `z = W x`, the statistics of `z` and the signs
    of `x`.

    Arguments and results as for `convolution.join`.
    """
    sizes = sizes_of(weight, join=True)
    variant = variant_of(
        y, affine=residual_scale is not None, statistics=statistics, signs=keep_signs
    )
    tile = conv1x1_rows.tile_of("join_forward", sizes, variant)
    rows, x, z = aligned_rows(y), empty_rows(y), empty_rows(y, sizes.outputs)
    parts, columns = parts_of(rows, tile, sizes.outputs)
    partial = empty_float32(y, parts, 3, sizes.outputs) if statistics else None
    signs = None
    if keep_signs:
        signs = y.new_empty((*rows.shape[:3], sizes.inputs // 8), dtype=torch.uint8)
    conv1x1_rows.join_forward(sizes, variant).launch(
        (parts * columns,),
        x,
        signs,
        z,
        partial,
        rows,
        as_float32(scale),
        as_float32(bias),
        aligned_rows(residual),
        as_float32(residual_scale),
        as_float32(residual_bias),
        aligned(weight),
        pixels_of(rows),
    )
    return x.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2), partial, signs


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    keep_output_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the gradient of `x [B, I, H, W]`, those of `bias` and `scale`, `[parts, 2, I]`, and
    with `keep_output_gradient` `gain grad + curve y + level`; or `grad` itself if it is not wanted.

    Arguments as for `convolution.backward`.
    """
    sizes = sizes_of(weight)
    keeps = keep_output_gradient and (y is not None or gain is not None)
    variant = variant_of(
        x,
        affine=scale is not None,
        statistics=y is not None,
        gain=gain is not None,
        output_gradient=keeps,
    )
    rows, dx = aligned_rows(grad), empty_rows(x)
    output_gradient = empty_rows(grad) if keeps else None
    tile = conv1x1_rows.tile_of("product_input_gradient", sizes, variant)
    parts, columns = parts_of(rows, tile, sizes.inputs)
    partial = None if scale is None else empty_float32(x, parts, 2, sizes.inputs)
    conv1x1_rows.input_gradient(sizes, variant).launch(
        (parts * columns,),
        dx,
        output_gradient,
        partial,
        rows,
        None if y is None else aligned_rows(y),
        as_float32(gain),
        as_float32(curve),
        as_float32(level),
        None if scale is None else aligned_rows(x),
        as_float32(scale),
        as_float32(bias),
        aligned(weight),
        pixels_of(rows),
    )
    return (
        dx.permute(0, 3, 1, 2),
        partial,
        grad if output_gradient is None else output_gradient.permute(0, 3, 1, 2),
    )


def join_input_gradient(
    grad: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    signs: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    z: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    keep_output_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradient `g` behind the ReLU of a join, and that of its output as
    `input_gradient` gives it; between them the sums of `g`, of `g y` and of `g residual` where
    there are these, `[parts, 1 to 3, I]`. Arguments as for `convolution.join_backward`."""
    sizes = sizes_of(weight, join=True)
    keeps = keep_output_gradient and (z is not None or gain is not None)
    variant = variant_of(
        x,
        affine=residual is not None,
        statistics=z is not None,
        gain=gain is not None,
        signs=signs is not None,
        output_gradient=keeps,
        joined=grad_x is not None,
        raw=y is not None,
    )
    rows, g = aligned_rows(grad), empty_rows(x)
    output_gradient = empty_rows(grad) if keeps else None
    tile = conv1x1_rows.tile_of("join_input_gradient", sizes, variant)
    parts, columns = parts_of(rows, tile, sizes.inputs)
    partial = empty_float32(x, parts, 1 + variant.raw + variant.affine, sizes.inputs)
    conv1x1_rows.join_input_gradient(sizes, variant).launch(
        (parts * columns,),
        g,
        output_gradient,
        partial,
        rows,
        None if z is None else aligned_rows(z),
        as_float32(gain),
        as_float32(curve),
        as_float32(level),
        None if grad_x is None else aligned_rows(grad_x),
        None if signs is not None else aligned_rows(x),
        signs,
        None if y is None else aligned_rows(y),
        None if residual is None else aligned_rows(residual),
        aligned(weight),
        pixels_of(rows),
    )
    output_gradient = grad if output_gradient is None else output_gradient.permute(0, 3, 1, 2)
    return g.permute(0, 3, 1, 2), partial, output_gradient


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the gradient of the weight `[O, I, 1, 1]`: `grad relu(scale x + bias)^T` over all
    pixels, in the dtype of the weight or another one."""
    sizes = sizes_of(weight)
    variant = variant_of(x, affine=scale is not None)
    tile = conv1x1_rows.weight_tile(sizes, variant)
    rows = aligned_rows(x)
    blocks = -(-sizes.outputs // tile.m) * -(-sizes.inputs // tile.n)
    shares = share_of(-(-pixels_of(rows) // tile.k), blocks, tile, x)
    partial = empty_float32(x, shares, sizes.outputs, sizes.inputs)
    conv1x1_rows.weight_gradient(sizes, variant).launch(
        (shares * blocks,),
        partial,
        aligned_rows(grad),
        rows,
        as_float32(scale),
        as_float32(bias),
        pixels_of(rows),
    )
    return partial.sum(0).to(weight.dtype if dtype is None else dtype).view(weight.shape)


# Processors of the machine that the interpreter stands in for: programs have several tiles there.
INTERPRETED_PROCESSORS = 1


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def share_of(tiles: int, columns: int, tile: Tile, x: Tensor) -> int:
    """Programs among which the tiles of a column are shared: as many as the GPU holds at a time."""
    processors = _processors(x.device.index) if x.is_cuda else INTERPRETED_PROCESSORS
    return max(1, min(tiles, processors * tile.programs // columns))


def parts_of(rows: Tensor, tile: Tile, channels: int) -> tuple[int, int]:
    """Returns the number of programs for each column of tiles of the result, and columns."""
    columns = -(-channels // tile.n)
    return share_of(-(-pixels_of(rows) // tile.m), columns, tile, rows), columns
