"""The last convolution of a block where its output is not stored: its statistics, the sum that ends
the block, and its gradients.

For `a = relu(scale x + bias)` and `y = W a`, over n pixels with the mean m of `a` and its scatter
`S = sum (a - m)(a - m)^T`, the sum of `y` is `n W m`, and its M2 the diagonal of `W S W^T`. So
BatchNorm's map of `y` is known before `y` is, and is applied to what a product has in its
registers. `Passes` as in kernels/conv1x1/convolution.py. B samples, I channels in, O channels out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import ConvGradients, behind_activation
from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.batch_norm.launch import Norm, Normalization, NormGradients
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.conv1x1 import launch as conv1x1_launch
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.layout import accumulation_dtype, on_device
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import Passes

from . import launch as recompute_launch


class Moments(NamedTuple):
    """What the gradients of the statistics need; in the accumulation dtype."""

    mean: Tensor
    """m, `[I]`."""
    spread: Tensor
    """`W S`, `[O, I]`."""


def _precise(weight: Tensor) -> Tensor:
    """Returns `[O, I]` in float64: products of such matrices are small, and TF32 may be on for
    float32."""
    return weight.flatten(1).double()


def _by_kernels(passes: Passes) -> bool:
    """Returns whether Triton kernels compute statistics and their gradients, as all that is
    pointwise."""
    return passes.forward or passes.pointwise


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def statistics(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, weight: Tensor, passes: Passes
) -> tuple[Tensor, Moments]:
    """Returns the (count, sum, M2) of `y = W relu(scale x + bias)`, `[1, 3, O]`, without `y`.

    `x [B, I, H, W]`, `weight [O, I, 1, 1]`; `scale` and `bias [I]`, or None for `y = W x`.
    """
    check_filled("x", x)
    if _by_kernels(passes):
        with on_device(x):
            mean, scatter = recompute_launch.moments(x, scale, bias)
            partial, spread = recompute_launch.product_statistics(weight, mean, scatter, _pixels(x))
        return partial, Moments(mean, spread)
    mean, scatter = conv1x1_library.moments(affine.activate(x, scale, bias))
    wide, count = _precise(weight), _pixels(x)
    sums = count * (wide @ mean.double())
    spread = wide @ scatter.double()
    # The scatter is positive semidefinite; rounding must not make a sum of squares negative.
    m2 = (spread * wide).sum(1).clamp_min(0)
    partial = torch.stack([torch.full_like(sums, count), sums, m2]).to(mean.dtype)
    return partial[None], Moments(mean, spread.to(mean.dtype))


def normalized(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    norm: Norm,
    passes: Passes,
) -> tuple[Normalization, Moments]:
    """Returns what a BatchNorm makes of the statistics of `y`; arguments as for `statistics`."""
    if not _by_kernels(passes):
        partial, moments = statistics(x, scale, bias, weight, passes)
        return batch_norm_launch.forward(partial, norm, False), moments
    check_filled("x", x)
    with on_device(x):
        mean, scatter = recompute_launch.moments(x, scale, bias)
        made, spread = recompute_launch.product_norm(weight, mean, scatter, norm, _pixels(x))
    return made, Moments(mean, spread)


def join(
    x: Tensor,
    x_scale: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    keep_signs: bool,
    passes: Passes,
) -> tuple[Tensor, Tensor | None]:
    """Returns `joined = relu(scale W relu(x_scale x + x_bias) + bias + residual)`, and its signs.

    Args:
        x, x_scale, x_bias, weight: `[B, I, H, W]`, `[I]`, `[O, I, 1, 1]`.
        scale, bias: `[O]`, the BatchNorm behind the product.
        residual: `[B, O, H, W]`.
        residual_scale, residual_bias: `[O]`, both or neither: the BatchNorm behind the residual.
        keep_signs: whether they are wanted.
        passes: who computes the product.
    """
    check_filled("x", x)
    if passes.forward:
        with on_device(x):
            return recompute_launch.product_join(
                x,
                x_scale,
                x_bias,
                weight,
                scale,
                bias,
                residual,
                residual_scale,
                residual_bias,
                keep_signs,
            )
    y = conv1x1_library.forward(affine.activate(x, x_scale, x_bias), weight)
    joined = residual_launch.forward(
        y, scale, bias, residual, residual_scale, residual_bias, passes.pointwise
    )
    return joined, conv1x1.pack_signs(joined) if keep_signs else None


def product_sums(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    passes: Passes,
) -> Tensor:
    """Returns the sums over the pixels of `grad relu(scale x + bias)^T`, `[O, I]`, not rounded to
    the dtype of `weight`, which is there for its shape."""
    check_filled("x", x)
    if passes.weight:
        wide = accumulation_dtype(x.dtype)
        with on_device(x):
            sums = conv1x1_launch.weight_gradient(grad, x, weight, scale, bias, wide)
        return sums.flatten(1)
    return conv1x1_library.wide_sums(grad, affine.activate(x, scale, bias))


def map_gradients(of_bias: Tensor, of_product: Tensor, weight: Tensor, passes: Passes) -> Tensor:
    """Returns the gradients of the bias and the scale behind a product, `[1, 2, O]`.

    That of the bias is `of_bias [O]`; that of the scale follows from `product_sums`.
    """
    if _by_kernels(passes):
        with on_device(weight):
            return recompute_launch.map_gradients(of_bias, of_product, weight)
    of_scale = (of_product * weight.flatten(1)).sum(1)
    return torch.stack([of_bias, of_scale.to(of_bias.dtype)])[None]


def norm_gradients(
    of_bias: Tensor,
    of_product: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Moments,
    normalization: Normalization,
    weight_dtype: torch.dtype,
    passes: Passes,
) -> tuple[NormGradients, tuple[Tensor, Tensor] | None]:
    """Returns the gradients of a BatchNorm of `normalized`, and what `backward` may be given.

    `of_bias [O]` is that of its map's bias; `of_product` as of `product_sums`, others as for
    `backward`.
    """
    if not _by_kernels(passes):
        sums = map_gradients(of_bias, of_product, weight, passes)
        return batch_norm_launch.backward(sums, normalization, False), None
    with on_device(x):
        return recompute_launch.norm_gradients(
            of_bias,
            of_product,
            weight,
            moments.spread,
            moments.mean,
            normalization,
            _pixels(x),
            weight_dtype,
        )


def backward(
    grad: Tensor,
    gain: Tensor,
    curve: Tensor | None,
    level: Tensor | None,
    of_product: Tensor,
    moments: Moments | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    need_input: bool,
    weight_dtype: torch.dtype,
    passes: Passes,
    made: tuple[Tensor, Tensor] | None = None,
) -> ConvGradients:
    """Returns the gradients for that of `y = W a`, `gain grad + curve y + level`, without `y`.

    That of `a = relu(scale x + bias)` is `(gain W)^T grad + W^T (curve W a + level)`.

    Args:
        grad: `[B, O, H, W]`.
        gain, curve, level: `[O]`; the last two, and `moments`, where the batch's statistics are
            used.
        of_product: `product_sums` of `grad`.
        moments: as `statistics` gave them.
        x, weight, scale, bias: as for `statistics`.
        need_input: whether the gradients of `x`, `scale` and `bias` are wanted.
        weight_dtype: of the gradient of the weight.
        passes: who computes.
        made: the gradient of the weight, and `gain W`, where `norm_gradients` has made them.
    """
    check_filled("x", x)
    if curve is None or level is None or moments is None:
        dweight = (gain[:, None] * of_product).to(weight_dtype).view_as(weight)
        of_output = (grad, None, gain, None, None)
        dx, sums, _ = conv1x1.backward(*of_output, x, weight, scale, bias, need_input, None, passes)
        return ConvGradients(dx, sums, dweight)
    square = shift = None
    if _by_kernels(passes):
        with on_device(x):
            dweight, of_weight = made or recompute_launch.weight_gradients(
                of_product,
                weight,
                moments.spread,
                moments.mean,
                gain,
                curve,
                level,
                _pixels(x),
                weight_dtype,
            )
            if need_input:
                square, shift = recompute_launch.moments_gradients(weight, curve, level)
    else:
        mean, wide = moments.mean.double(), _precise(weight)
        # Of the sum alone: the level is what remains of it where the curve meets the whole product.
        of_sum = level + curve * (wide @ mean)
        dweight = gain[:, None] * of_product + curve[:, None] * moments.spread
        dweight = dweight + torch.outer(of_sum, _pixels(x) * mean)
        dweight = dweight.to(weight_dtype).view_as(weight)
        of_weight = (gain[:, None] * wide).to(moments.mean.dtype)
        if need_input:
            square = (wide.t() @ (curve[:, None] * wide)).to(moments.mean.dtype)
            shift = (level.double() @ wide).to(moments.mean.dtype)
    if square is None or shift is None:
        return ConvGradients(None, None, dweight)
    if passes.input:
        with on_device(x):
            dx, sums = recompute_launch.moments_gradient(
                grad, of_weight, square, shift, x, scale, bias
            )
    else:
        h = affine.activate(x, scale, bias)
        of_activated = conv1x1_library.moments_gradient(grad, of_weight, square, shift, h)
        if scale is not None:
            of_activated = of_activated.to(shift.dtype)
        dx, sums = behind_activation(of_activated, x, scale, bias)
    return ConvGradients(dx, sums, dweight)
