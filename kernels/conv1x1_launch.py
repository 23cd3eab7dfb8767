"""The 1x1 convolutions and their gradients by the Triton kernels: tensors in, tensors out.

Nothing is checked here. B samples, I channels in, O channels out, maps of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import conv1x1_configs as configs
from .configs import LaunchRow
from .conv1x1_configs import ProductSizes, ProductVariant, Tile
from .grouped_configs import merge_statistics
from .launch import DTYPES, architecture, as_rows, empty_rows, tf32_allowed

Row = Callable[[ProductSizes, ProductVariant], LaunchRow]
# Processors of the machine that the interpreter stands in for: programs have several tiles there.
INTERPRETED_PROCESSORS = 1


def forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor]:
    """`y [B, O, H, W]`, channels-last, and its (count, sum, M2) `[3, O]` float32, or `[0]`.

    Args:
        x: `[B, I, H, W]`; copied unless channels-last.
        weight: `[O, I, 1, 1]` in the dtype of `x`.
        scale, bias: `[I]` or None; `relu(scale x + bias)` is multiplied instead of `x`.
        statistics: whether they are wanted.
    """
    sizes = ProductSizes(weight.shape[1], weight.shape[0])
    variant = _variant(x, affine=scale is not None, statistics=statistics)
    tile = configs.forward_tile(sizes, variant)
    rows, y = _aligned(x), empty_rows(x, sizes.outputs)
    parts, columns = _parts(rows, tile, sizes.outputs)
    partial = _floats(x, parts, 3, sizes.outputs) if statistics else None
    configs.forward(sizes, variant).launch(
        (parts * columns,),
        y,
        partial,
        rows,
        _vector(scale),
        _vector(bias),
        _weight(weight),
        _pixels(rows),
    )
    return y.permute(0, 3, 1, 2), _merged(x, partial)


def folded_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """`y = relu(factor W x + bias + residual)`, `[B, O, H, W]`.

    Arguments as for the operator `folded_conv1x1`.
    """
    sizes = ProductSizes(weight.shape[1], weight.shape[0])
    variant = _variant(x, residual=residual is not None, factor=factor is not None)
    rows, y = _aligned(x), empty_rows(x, sizes.outputs)
    parts, columns = _parts(rows, configs.forward_tile(sizes, variant), sizes.outputs)
    configs.folded(sizes, variant).launch(
        (parts * columns,),
        y,
        rows,
        _weight(weight),
        _vector(bias),
        None if residual is None else _aligned(residual),
        _vector(factor),
        _pixels(rows),
        rows.shape[1] * rows.shape[2],
    )
    return y.permute(0, 3, 1, 2)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x = relu(scale y + bias + residual)`, `z = W x`, the statistics of `z` and the signs of `x`.

    Arguments and results as for the operator `join_conv1x1`.
    """
    sizes = ProductSizes(weight.shape[1], weight.shape[0], join=True)
    variant = _variant(
        y, affine=residual_scale is not None, statistics=statistics, signs=keep_signs
    )
    tile = configs.forward_tile(sizes, variant)
    rows, x, z = _aligned(y), empty_rows(y), empty_rows(y, sizes.outputs)
    parts, columns = _parts(rows, tile, sizes.outputs)
    partial = _floats(y, parts, 3, sizes.outputs) if statistics else None
    shape = (*rows.shape[:3], sizes.inputs // 8) if keep_signs else (0,)
    signs = y.new_empty(shape, dtype=torch.uint8)
    configs.join_forward(sizes, variant).launch(
        (parts * columns,),
        x,
        signs if keep_signs else None,
        z,
        partial,
        rows,
        _vector(scale),
        _vector(bias),
        _aligned(residual),
        _vector(residual_scale),
        _vector(residual_bias),
        _weight(weight),
        _pixels(rows),
    )
    return x.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2), _merged(y, partial), signs


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
    keep_moved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `x [B, I, H, W]`, those of `bias` and `scale`, `[2, I]` or `[0]`, and with
    `keep_moved` `gain grad + curve y + level`; in its place `grad` if it is not wanted.

    Arguments as for the operator `conv1x1_backward`.
    """
    sizes = ProductSizes(weight.shape[1], weight.shape[0])
    moves = keep_moved and (y is not None or gain is not None)
    variant = _variant(
        x,
        affine=scale is not None,
        statistics=y is not None,
        gain=gain is not None,
        moved=moves,
    )
    rows, dx = _aligned(grad), empty_rows(x)
    moved = empty_rows(grad) if moves else None
    parts, columns = _parts(rows, configs.gradient_tile(sizes, variant), sizes.inputs)
    partial = None if scale is None else _floats(x, parts, 2, sizes.inputs)
    configs.input_gradient(sizes, variant).launch(
        (parts * columns,),
        dx,
        moved,
        partial,
        rows,
        None if y is None else _aligned(y),
        _vector(gain),
        _vector(curve),
        _vector(level),
        None if scale is None else _aligned(x),
        _vector(scale),
        _vector(bias),
        _weight(weight),
        _pixels(rows),
    )
    sums = _floats(x, 0) if partial is None else partial.sum(0)
    return dx.permute(0, 3, 1, 2), sums, grad if moved is None else moved.permute(0, 3, 1, 2)


def join_input_gradient(
    grad: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    signs: Tensor | None,
    y: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    z: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    keep_moved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient behind the ReLU of a join, its sums `[2 or 3, I]`, and the moved gradient as
    `input_gradient` gives it. Arguments as for the operator `join_conv1x1_backward`."""
    sizes = ProductSizes(weight.shape[1], weight.shape[0], join=True)
    moves = keep_moved and (z is not None or gain is not None)
    variant = _variant(
        x,
        affine=residual is not None,
        statistics=z is not None,
        gain=gain is not None,
        signs=signs is not None,
        moved=moves,
        joined=grad_x is not None,
    )
    rows, g = _aligned(grad), empty_rows(x)
    moved = empty_rows(grad) if moves else None
    parts, columns = _parts(rows, configs.gradient_tile(sizes, variant), sizes.inputs)
    partial = _floats(x, parts, 2 if residual is None else 3, sizes.inputs)
    configs.join_input_gradient(sizes, variant).launch(
        (parts * columns,),
        g,
        moved,
        partial,
        rows,
        None if z is None else _aligned(z),
        _vector(gain),
        _vector(curve),
        _vector(level),
        None if grad_x is None else _aligned(grad_x),
        None if signs is not None else _aligned(x),
        signs,
        _aligned(y),
        None if residual is None else _aligned(residual),
        _weight(weight),
        _pixels(rows),
    )
    moved_grad = grad if moved is None else moved.permute(0, 3, 1, 2)
    return g.permute(0, 3, 1, 2), partial.sum(0), moved_grad


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The gradient of the weight `[O, I, 1, 1]`: `grad relu(scale x + bias)^T` over all pixels."""
    sizes = ProductSizes(weight.shape[1], weight.shape[0])
    variant = _variant(x, affine=scale is not None)
    tile = configs.weight_tile(sizes, variant)
    rows = _aligned(x)
    blocks = -(-sizes.outputs // tile.m) * -(-sizes.inputs // tile.n)
    shares = _share(-(-_pixels(rows) // tile.k), blocks, tile, x)
    partial = _floats(x, shares, sizes.outputs, sizes.inputs)
    configs.weight_gradient(sizes, variant).launch(
        (shares * blocks,),
        partial,
        _aligned(grad),
        rows,
        _vector(scale),
        _vector(bias),
        _pixels(rows),
    )
    return partial.sum(0).to(weight.dtype).view(weight.shape)


def _variant(x: Tensor, **options: bool) -> ProductVariant:
    dtype = DTYPES[x.dtype]
    return ProductVariant(
        dtype=dtype,
        tf32=dtype == "fp32" and tf32_allowed(),
        arch=architecture(x.device.index) if x.is_cuda else "cpu",
        **options,
    )


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _share(tiles: int, columns: int, tile: Tile, x: Tensor) -> int:
    """Programs among which the tiles of a column are shared: as many as the GPU holds at a time."""
    processors = _processors(x.device.index) if x.is_cuda else INTERPRETED_PROCESSORS
    return max(1, min(tiles, processors * tile.programs // columns))


def _parts(rows: Tensor, tile: Tile, channels: int) -> tuple[int, int]:
    """Programs for each column of tiles of the result, and columns."""
    columns = -(-channels // tile.n)
    return _share(-(-_pixels(rows) // tile.m), columns, tile, rows), columns


def _pixels(rows: Tensor) -> int:
    return rows.numel() // rows.shape[3]


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _aligned(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as contiguous rows `[B, H, W, C]` at 16 bytes."""
    rows = as_rows(x)
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _weight(weight: Tensor) -> Tensor:
    contiguous = weight.contiguous()
    return contiguous if contiguous.data_ptr() % 16 == 0 else contiguous.clone()


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _merged(like: Tensor, partial: Tensor | None) -> Tensor:
    """The statistics of all tiles from those of the programs."""
    if partial is None:
        return _floats(like, 0)
    parts, _, channels = partial.shape
    total = _floats(like, 3, channels)
    merge_statistics(channels).launch((-(-channels // 8),), total, partial, parts)
    return total
