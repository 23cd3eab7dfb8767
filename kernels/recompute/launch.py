"""The kernels for a 1x1 convolution at the end of a residual block whose output is not stored:
tensors in, tensors out.

Nothing is checked here. B samples, I channels in, O channels out, maps of H x W pixels; a weight is
`[O, I]` or `[O, I, 1, 1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.batch_norm.launch import Norm, Normalization, NormGradients
from coded_resnext.kernels.conv1x1.launch import parts_of, share_of, sizes_of
from coded_resnext.kernels.conv1x1.rows import tile_of
from coded_resnext.kernels.layout import (
    DTYPES,
    aligned,
    aligned_rows,
    as_float32,
    empty_float32,
    empty_rows,
    pixels_of,
    variant_of,
)

from . import rows as recompute_rows

NO_NORM = Norm(None, None, 0.0)


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
    """Computes `relu(factor out_scale (W relu(scale x + bias)) + out_bias + residual)` and its
    signs.

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
    tile = tile_of("product_join", sizes, variant)
    parts, columns = parts_of(rows, tile, sizes.outputs)
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
    """Returns the mean `[I]` and the scatter `[I, I]` of `a = relu(scale x + bias)` over all
    pixels: the sum of `(a - mean)(a - mean)^T`, both float32.

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
    mean, scatter = empty_float32(x, channels), empty_float32(x, channels, channels)
    recompute_rows.merge_moments(channels).launch(
        recompute_rows.scatter_grid(channels),
        mean,
        scatter,
        partial,
        sums,
        shares,
        pixels_of(rows),
    )
    return mean, scatter


def product_statistics(
    weight: Tensor, mean: Tensor, scatter: Tensor, pixels: int
) -> tuple[Tensor, Tensor]:
    """Returns the (count, sum, M2) of `W a`, `[1, 3, O]`, and `W S`, `[O, I]`, both float32.

    Args:
        weight: `[O, I, 1, 1]` in the dtype of the activations.
        mean, scatter: `[I]` and `[I, I]`, of `moments`.
        pixels: over which these were taken.
    """
    statistics = empty_float32(weight, 1, 3, len(weight))
    spread = _product_statistics((statistics, None, None), weight, mean, scatter, None, pixels)
    return statistics, spread


def product_norm(
    weight: Tensor, mean: Tensor, scatter: Tensor, norm: Norm, pixels: int
) -> tuple[Normalization, Tensor]:
    """Returns what a BatchNorm makes of `product_statistics`, and `W S`, in one launch."""
    made = Normalization(
        empty_float32(weight, 2, len(weight)), empty_float32(weight, 4, len(weight))
    )
    return made, _product_statistics((None, *made), weight, mean, scatter, norm, pixels)


def _product_statistics(
    results: tuple[Tensor | None, ...],
    weight: Tensor,
    mean: Tensor,
    scatter: Tensor,
    norm: Norm | None,
    pixels: int,
) -> Tensor:
    sizes = sizes_of(weight)
    spread = empty_float32(weight, sizes.outputs, sizes.inputs)
    of = None if norm is None else norm.present()
    recompute_rows.product_statistics(sizes, DTYPES[weight.dtype], of).launch(
        recompute_rows.outputs_grid(sizes),
        spread,
        *results,
        aligned(weight),
        mean,
        scatter,
        *(norm or NO_NORM).arguments(),
        pixels,
    )
    return spread


def map_gradients(of_bias: Tensor, of_product: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradients of bias and scale behind the product, `[1, 2, O]` float32.

    Args:
        of_bias: that of the bias, `[O]`.
        of_product: `sum grad a^T` over the pixels, `[O, I]` float32.
        weight: `[O, I, 1, 1]` in the dtype of the activations.
    """
    sizes = sizes_of(weight)
    sums = empty_float32(weight, 1, 2, sizes.outputs)
    recompute_rows.map_gradients(sizes, DTYPES[weight.dtype]).launch(
        recompute_rows.outputs_grid(sizes),
        sums,
        aligned(of_bias),
        aligned(of_product),
        aligned(weight),
    )
    return sums


def weight_gradients(
    of_product: Tensor,
    weight: Tensor,
    spread: Tensor,
    mean: Tensor,
    gain: Tensor,
    curve: Tensor,
    level: Tensor,
    pixels: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the weight in a dtype, in its shape, where that of `y = W a` is `gain
    grad + curve y + level`; and `gain W`, `[O, I]` in the dtype of the weight.

    Args:
        of_product, weight: as for `map_gradients`.
        spread, mean, pixels: `W S` and the arguments of `product_statistics`.
        gain, curve, level: `[O]` float32.
        dtype: of the gradient.
    """
    given = (None, None, None, aligned(gain), aligned(curve), aligned(level))
    return _weight_gradients(None, of_product, weight, spread, mean, given, pixels, dtype)


def norm_gradients(
    of_bias: Tensor,
    of_product: Tensor,
    weight: Tensor,
    spread: Tensor,
    mean: Tensor,
    normalization: Normalization,
    pixels: int,
    dtype: torch.dtype,
) -> tuple[NormGradients, tuple[Tensor, Tensor]]:
    """Returns the gradients of a BatchNorm behind the product and, as they follow from these,
    `weight_gradients`, in one launch.

    Args:
        of_bias: that of the bias of the BatchNorm's map, `[O]`.
        normalization: what `product_norm` gave.
        of_product, weight, spread, mean, pixels, dtype: as for `weight_gradients`.
    """
    gradients = empty_float32(weight, 4, len(weight))
    own = (aligned(of_bias), *normalization, None, None, None)
    both = _weight_gradients(gradients, of_product, weight, spread, mean, own, pixels, dtype)
    return NormGradients(*gradients), both


def _weight_gradients(
    of_norm: Tensor | None,
    of_product: Tensor,
    weight: Tensor,
    spread: Tensor,
    mean: Tensor,
    vectors: tuple[Tensor | None, ...],
    pixels: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    sizes = sizes_of(weight)
    gradient = weight.new_empty(weight.shape, dtype=dtype)
    scaled = weight.new_empty(sizes.outputs, sizes.inputs)
    row = recompute_rows.weight_gradients(
        sizes, DTYPES[weight.dtype], DTYPES[dtype], norm=of_norm is not None
    )
    row.launch(
        recompute_rows.outputs_grid(sizes),
        gradient,
        scaled,
        of_norm,
        aligned(of_product),
        aligned(weight),
        spread,
        mean,
        *vectors,
        pixels,
    )
    return gradient, scaled


def moments_gradients(weight: Tensor, curve: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `Q = W^T curve W`, `[I, I]`, and `t = W^T level`, `[I]`, as `moments_gradient` takes
    them.

    Q has the dtype of the weight, in float16 float32.
    """
    sizes = sizes_of(weight)
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    square = weight.new_empty(sizes.inputs, sizes.inputs, dtype=dtype)
    shift = empty_float32(weight, sizes.inputs)
    recompute_rows.moments_gradients(sizes, DTYPES[weight.dtype]).launch(
        recompute_rows.inputs_grid(sizes),
        square,
        shift,
        aligned(weight),
        aligned(curve),
        aligned(level),
    )
    return square, shift


def moments_gradient(
    grad: Tensor,
    weight: Tensor,
    square: Tensor,
    shift: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of `x [B, I, H, W]` and those of `bias` and `scale`, `[parts, 2, I]`,
    where that of `h = relu(scale x + bias)` is `V^T grad + Q h + t`; without these `h = x`, and
    None.

    Args:
        grad: `[B, O, H, W]`.
        weight, square: V, `[O, I]`, and the symmetric Q, `[I, I]`. They are multiplied in the dtype
            of `x`, in float16 Q, in float32, in units of its largest element: it would end in 0.
        shift: t, `[I]`.
        x, scale, bias: as for the forward pass.
    """
    sizes = sizes_of(weight)
    variant = variant_of(x, affine=scale is not None)
    rows, dx = aligned_rows(x), empty_rows(x)
    tile = tile_of("moments_input_gradient", sizes, variant)
    parts, columns = parts_of(rows, tile, sizes.inputs)
    partial = None if scale is None else empty_float32(x, parts, 2, sizes.inputs)
    size = None
    if x.dtype == torch.float16:
        size = square.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        square = square / size
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
    """Returns `y = relu(factor W x + bias + residual)`, `[B, O, H, W]`.

    Arguments as for the operator `folded_conv1x1`.
    """
    y, _ = product_join(x, None, None, weight, None, bias, residual, None, None, False, factor)
    return y
