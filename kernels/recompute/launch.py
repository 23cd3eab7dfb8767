"""The kernels for a 1x1 convolution at the end of a residual block whose output is not stored:
tensors in, tensors out.

Nothing is checked here. B samples, I channels in, O channels out, maps of H x W pixels; a weight is
`[O, I]` or `[O, I, 1, 1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.conv1x1.launch import parts_of, share_of, sizes_of
from coded_resnext.kernels.conv1x1.rows import forward_tile, gradient_tile
from coded_resnext.kernels.layout import (
    aligned,
    aligned_rows,
    as_float32,
    empty_float32,
    empty_rows,
    pixels_of,
    variant_of,
)

from . import rows as recompute_rows


def product_join(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    out_scale: Tensor | None,
    out_bias: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    keep_signs: bool,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`relu(factor out_scale (W relu(scale x + bias)) + out_bias + residual)` and its signs.

    Args:
        x: `[B, I, H, W]`; copied unless channels-last.
        scale, bias: `[I]`, or None to multiply `x` itself.
        weight: in the dtype of `x`.
        out_scale, out_bias: `[O]`; the scale may be None. It multiplies the float32 product.
        residual: `[B, O, H, W]` in the dtype of `x`, or None.
        residual_scale, residual_bias: `[O]`, a map of the residual, or None.
        keep_signs: whether the signs are wanted; then O is a multiple of 8.
        factor: `[B]` or None.

    Returns:
        `[B, O, H, W]`, channels-last, and one bit for each of its elements that is above 0, in
        bytes `[B, H, W, O / 8]`, the first channel lowest; None without `keep_signs`.
    """
    sizes = sizes_of(weight)
    variant = variant_of(
        x,
        affine=scale is not None,
        scaled=out_scale is not None,
        residual=residual is not None,
        mapped=residual_scale is not None,
        signs=keep_signs,
        factor=factor is not None,
    )
    rows, y = aligned_rows(x), empty_rows(x, sizes.outputs)
    parts, columns = parts_of(rows, forward_tile(sizes, variant), sizes.outputs)
    signs = None
    if keep_signs:
        signs = x.new_empty((*rows.shape[:3], sizes.outputs // 8), dtype=torch.uint8)
    recompute_rows.product_join(sizes, variant).launch(
        (parts * columns,),
        y,
        signs,
        rows,
        as_float32(scale),
        as_float32(bias),
        aligned(weight),
        as_float32(out_scale),
        as_float32(out_bias),
        None if residual is None else aligned_rows(residual),
        as_float32(residual_scale),
        as_float32(residual_bias),
        as_float32(factor),
        pixels_of(rows),
        rows.shape[1] * rows.shape[2],
    )
    return y.permute(0, 3, 1, 2), signs


def moments(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean `[I]` and the scatter `[I, I]` of `a = relu(scale x + bias)` over all pixels: the
    sum of `(a - mean)(a - mean)^T`, both float32.

    Args:
        x: `[B, I, H, W]`; copied unless channels-last.
        scale, bias: `[I]`, or None for `a = x`. The activations are rounded to the dtype of `x`,
            as `product_join` multiplies them.
    """
    channels = x.shape[1]
    variant = variant_of(x, affine=scale is not None)
    tile, rows = recompute_rows.moments_tile(channels, variant), aligned_rows(x)
    blocks = recompute_rows.moments_blocks(channels, tile)
    shares = share_of(-(-pixels_of(rows) // tile.k), blocks, tile, x)
    partial = empty_float32(x, shares, channels, channels)
    sums = empty_float32(x, shares, 2, channels)
    recompute_rows.moments(channels, variant).launch(
        (shares * blocks,),
        partial,
        sums,
        rows,
        as_float32(scale),
        as_float32(bias),
        pixels_of(rows),
    )
    mean, apart = sums.sum(0, dtype=torch.float64) / pixels_of(rows)
    upper = partial.sum(0, dtype=torch.float64) - pixels_of(rows) * apart[:, None] * apart
    return mean.float(), (upper.triu() + upper.triu(1).mT).float()


def moments_gradient(
    grad: Tensor,
    weight: Tensor,
    square: Tensor,
    shift: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `x [B, I, H, W]` and those of `bias` and `scale`, `[parts, 2, I]`, where that
    of `h = relu(scale x + bias)` is `V^T grad + Q h + t`; without these `h = x`, and None.

    Args:
        grad: `[B, O, H, W]`.
        weight, square: V, `[O, I]`, and the symmetric Q, `[I, I]`, in float32. They are multiplied
            in the dtype of `x`, in float16 Q in units of its largest element: it would end in 0.
        shift: t, `[I]`.
        x, scale, bias: as for the forward pass.
    """
    sizes = sizes_of(weight)
    variant = variant_of(x, affine=scale is not None)
    rows, dx = aligned_rows(x), empty_rows(x)
    parts, columns = parts_of(rows, gradient_tile(sizes, variant), sizes.inputs)
    partial = None if scale is None else empty_float32(x, parts, 2, sizes.inputs)
    if x.dtype == torch.float16:
        size = square.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        square = square / size
    else:
        size = square.new_ones(())
    recompute_rows.moments_gradient(sizes, variant).launch(
        (parts * columns,),
        dx,
        partial,
        aligned_rows(grad),
        aligned(weight.to(x.dtype)),
        aligned(square.to(x.dtype)),
        size,
        as_float32(shift),
        rows,
        as_float32(scale),
        as_float32(bias),
        pixels_of(rows),
    )
    return dx.permute(0, 3, 1, 2), partial


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
    y, _ = product_join(x, None, None, weight, None, bias, residual, None, None, False, factor)
    return y
