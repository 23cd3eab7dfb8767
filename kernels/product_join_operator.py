"""The last convolution of a block, the sum that ends the block, and the first convolution of the
next, as the PyTorch operator `coded_resnext::product_join`: only the sum and the last are written.

The statistics of the product are known beforehand (unwritten_operator.py), so that BatchNorm is
applied to what the product has in its registers. Kernels, layouts and letters as in
conv1x1_operators.py; signs as in conv1x1_join_operators.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import conv1x1_launch, conv1x1_library, gram, join_launch, product_join_launch
from .batch_statistics import statistics_gradient
from .conv1x1_join_operators import join_conv1x1_backward, pack_signs
from .conv1x1_operators import POINTWISE, fake_outputs
from .join_operator import join_backward
from .launch import empty_rows, on_device
from .reference import accumulation_dtype


@torch.library.custom_op("coded_resnext::product_join", mutates_args=())
def product_join(
    place: Tensor,
    place_of_sums: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_bias: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    next_weight: Tensor | None,
    statistics: bool,
    keep_signs: bool,
    kernels: str,
    next_kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`joined = relu(scale W relu(x_scale x + x_bias) + bias + residual)`, `z = V joined`.

    Args:
        place, place_of_sums: what `unwritten_conv1x1` gave for `x`, its map and `weight`. They get
            the gradients in the place of `x`, its map and `weight`, which get none here.
        x, x_scale, x_bias, weight: `[B, I, H, W]`, `[I]`, `[O, I, 1, 1]`.
        scale, bias: `[O]`, the BatchNorm behind the product.
        residual: `[B, O, H, W]`.
        residual_scale, residual_bias: `[O]`, both or neither: the BatchNorm behind the residual,
            whose gradient then goes out without its factor, to whoever made it with `deferred`.
        next_weight: V, `[P, O, 1, 1]`, or None.
        statistics, keep_signs: as for `join_conv1x1`, of `z` and of `joined`.
        kernels, next_kernels: as for `conv1x1`, of the two convolutions.

    Returns:
        `joined [B, O, H, W]`, `z [B, P, H, W]`, its statistics and the signs; `[0]` for what is not
        wanted.
    """
    if "forward" in kernels.split():
        with on_device(x):
            joined, signs = product_join_launch.product_join(
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
    else:
        y = conv1x1_library.forward(gram.activate(x, x_scale, x_bias), weight)
        pointwise = POINTWISE in kernels.split()
        joined = join_launch.forward(
            y, scale, bias, residual, residual_scale, residual_bias, pointwise
        )
        signs = pack_signs(joined) if keep_signs else x.new_empty((0,), dtype=torch.uint8)
    if next_weight is None:
        return joined, x.new_empty((0,)), _no_statistics(x), signs
    if "forward" in next_kernels.split():
        with on_device(x):
            z, sums = conv1x1_launch.forward(joined, next_weight, None, None, statistics)
    else:
        z = conv1x1_library.forward(joined, next_weight)
        sums = join_launch.statistics(z, POINTWISE in next_kernels.split(), statistics)
    return joined, z, sums, signs


@product_join.register_fake
def _(
    place: Tensor,
    place_of_sums: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_bias: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    next_weight: Tensor | None,
    statistics: bool,
    keep_signs: bool,
    kernels: str,
    next_kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = residual.shape
    shape = (batch, height, width, channels // 8) if keep_signs else (0,)
    signs = x.new_empty(shape, dtype=torch.uint8)
    joined = empty_rows(x, channels).permute(0, 3, 1, 2)
    if next_weight is None:
        return joined, x.new_empty((0,)), _no_statistics(x), signs
    return joined, *fake_outputs(joined, next_weight, statistics), signs


def _no_statistics(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("coded_resnext::product_sums", mutates_args=())
def product_sums(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, kernels: str
) -> Tensor:
    """The sums over the pixels of `grad relu(scale x + bias)^T`, `[O, I]`, not rounded to the dtype
    of `weight`, which is there for its shape."""
    wide = accumulation_dtype(x.dtype)
    if "weight" in kernels.split():
        with on_device(x):
            sums = conv1x1_launch.weight_gradient(grad, x, weight, scale, bias, wide)
        return sums.flatten(1)
    return conv1x1_library.wide_sums(grad, gram.activate(x, scale, bias))


@product_sums.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, kernels: str) -> Tensor:
    return x.new_empty(tuple(weight.shape[:2]), dtype=accumulation_dtype(x.dtype))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, x, x_scale, x_bias, weight, scale, _, residual, residual_scale = inputs[:10]
    _, next_weight, ctx.statistics, _, ctx.kernels, ctx.next_kernels = inputs[10:]
    joined, z, statistics, signs = output
    ctx.mark_non_differentiable(signs)
    ctx.scale_dtype = scale.dtype
    mapped = residual if residual_scale is not None else None
    kept = (z, statistics) if ctx.statistics else (None, None)
    ctx.save_for_backward(
        x,
        x_scale,
        x_bias,
        weight,
        joined,
        signs if signs.numel() else None,
        mapped,
        next_weight,
        *kept,
    )


def _gradients(ctx: Any, grad_joined: Tensor, grad: Tensor, grad_statistics: Tensor, _: Any) -> Any:
    saved = ctx.saved_tensors
    x, x_scale, x_bias, weight, joined, signs, residual, next_weight, z, statistics = saved
    dnext = None
    if next_weight is None:
        pointwise = POINTWISE in ctx.kernels.split()
        g, sums = join_backward(grad_joined, joined, None, residual, pointwise)
    else:
        curve = level = None
        if ctx.statistics:
            curve, level = statistics_gradient(grad_statistics, statistics)
        g, sums, dnext = join_conv1x1_backward(
            grad,
            grad_joined,
            joined,
            signs,
            None,
            residual,
            next_weight,
            z,
            None,
            curve,
            level,
            True,
            ctx.needs_input_grad[11],
            ctx.next_kernels,
        )
    of_product = product_sums(g, x, weight, x_scale, x_bias, ctx.kernels)
    dscale = (of_product * weight.flatten(1)).sum(1).to(ctx.scale_dtype)
    sums = sums.to(ctx.scale_dtype)
    of_map = (None, None) if residual is None else (sums[1], sums[0])
    found = [g, of_product, None, None, None, None, dscale, sums[0], g, *of_map]
    if not ctx.needs_input_grad[11]:
        dnext = None
    return *found, dnext, None, None, None, None


product_join.register_autograd(_gradients, setup_context=_save)
