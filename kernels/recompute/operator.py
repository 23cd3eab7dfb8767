"""The last convolution of a block, the sum that ends the block, and the first convolution of the
next, as the PyTorch operator `coded_resnext::product_join`: only the sum and the last are written.

The statistics of the product are known beforehand (kernels/recompute/moments_operator.py), so that
BatchNorm is applied to what the product has in its registers. Kernels, layouts and letters as in
kernels/conv1x1/operator.py; signs as in kernels/conv1x1/join_operator.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import statistics_gradient
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.conv1x1 import launch as conv1x1_launch
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.conv1x1.join_operator import join_conv1x1_backward, pack_signs
from coded_resnext.kernels.conv1x1.operator import fake_outputs
from coded_resnext.kernels.layout import accumulation_dtype, empty_rows, on_device
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.residual.operator import join_backward
from coded_resnext.kernels.rows import NO_PASSES, Passes

from . import launch as recompute_launch


@torch.library.custom_op("coded_resnext::product_join", mutates_args=())
def product_join(
    handle: Tensor,
    sums_handle: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_bias: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    residual_handle: Tensor | None,
    residual_sums_handle: Tensor | None,
    residual_weight: Tensor | None,
    next_weight: Tensor | None,
    statistics: bool,
    keep_signs: bool,
    kernels: int,
    next_kernels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`joined = relu(scale W relu(x_scale x + x_bias) + bias + residual)`, `z = V joined`.

    Args:
        handle, sums_handle: what `recomputed_conv1x1` gave for `x`, its map and `weight`. They get
            the gradients in the place of `x`, its map and `weight`, which get none here.
        x, x_scale, x_bias, weight: `[B, I, H, W]`, `[I]`, `[O, I, 1, 1]`.
        scale, bias: `[O]`, the BatchNorm behind the product.
        residual: `[B, O, H, W]`, or the operand of the convolution that is to give it.
        residual_scale, residual_bias: `[O]`, both or neither: the BatchNorm behind the residual,
            whose gradient then goes out without its factor, to whoever made it with `deferred`.
        residual_handle, residual_sums_handle, residual_weight: of the residual's convolution,
            which has no map before it; all or none. PyTorch multiplies.
        next_weight: V, `[P, O, 1, 1]`, or None.
        statistics, keep_signs: as for `join_conv1x1`, of `z` and of `joined`.
        kernels, next_kernels: as for `conv1x1`, of the two convolutions.

    Returns:
        `joined [B, O, H, W]`, `z [B, P, H, W]`, its statistics and the signs; `[0]` for what is not
        wanted.
    """
    check_filled("x", x)
    if residual_weight is not None:
        residual = conv1x1_library.forward(residual, residual_weight)
    passes, next_passes = Passes.decoded(kernels), Passes.decoded(next_kernels)
    if passes.forward:
        with on_device(x):
            joined, signs = recompute_launch.product_join(
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
        y = conv1x1_library.forward(affine.activate(x, x_scale, x_bias), weight)
        joined = residual_launch.forward(
            y, scale, bias, residual, residual_scale, residual_bias, passes.pointwise
        )
        signs = pack_signs(joined) if keep_signs else x.new_empty((0,), dtype=torch.uint8)
    if next_weight is None:
        return joined, x.new_empty((0,)), _no_statistics(x), signs
    if next_passes.forward:
        with on_device(x):
            z, sums = conv1x1_launch.forward(joined, next_weight, None, None, statistics)
    else:
        z = conv1x1_library.forward(joined, next_weight)
        sums = residual_launch.statistics(z, next_passes.pointwise, statistics)
    return joined, z, sums, signs


@product_join.register_fake
def _(
    handle: Tensor,
    sums_handle: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_bias: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    residual_handle: Tensor | None,
    residual_sums_handle: Tensor | None,
    residual_weight: Tensor | None,
    next_weight: Tensor | None,
    statistics: bool,
    keep_signs: bool,
    kernels: int,
    next_kernels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = handle.shape
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
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernels: int,
) -> Tensor:
    """The sums over the pixels of `grad relu(scale x + bias)^T`, `[O, I]`, not rounded to the dtype
    of `weight`, which is there for its shape."""
    check_filled("x", x)
    wide = accumulation_dtype(x.dtype)
    if Passes.decoded(kernels).weight:
        with on_device(x):
            sums = conv1x1_launch.weight_gradient(grad, x, weight, scale, bias, wide)
        return sums.flatten(1)
    return conv1x1_library.wide_sums(grad, affine.activate(x, scale, bias))


@product_sums.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, kernels: int) -> Tensor:
    return x.new_empty(tuple(weight.shape[:2]), dtype=accumulation_dtype(x.dtype))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, x, x_scale, x_bias, weight, scale, _, residual, residual_scale = inputs[:10]
    _, _, _, residual_weight, next_weight, ctx.statistics, _ = inputs[10:17]
    ctx.kernels, ctx.next_kernels = inputs[17:]
    joined, z, statistics, signs = output
    ctx.mark_non_differentiable(signs)
    ctx.scale_dtype = scale.dtype
    ctx.save_for_backward(
        x,
        x_scale,
        x_bias,
        weight,
        joined,
        signs if signs.numel() else None,
        residual if residual_scale is not None else None,
        residual_weight,
        next_weight,
        *((z, statistics) if ctx.statistics else (None, None)),
    )


def _gradients(ctx: Any, grad_joined: Tensor, grad: Tensor, grad_statistics: Tensor, _: Any) -> Any:
    x, x_scale, x_bias, weight, joined, signs, *others = ctx.saved_tensors
    residual, residual_weight, next_weight, z, statistics = others
    # Of a residual that was written, the sum of it times the gradient is taken on the way.
    written = residual if residual_weight is None else None
    dnext = None
    if next_weight is None:
        pointwise = Passes.decoded(ctx.kernels).pointwise
        g, sums = join_backward(grad_joined, joined, None, written, pointwise)
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
            written,
            next_weight,
            z,
            None,
            curve,
            level,
            True,
            ctx.needs_input_grad[14],
            ctx.next_kernels,
        )

    def of_scale(of_product: Tensor, factor: Tensor) -> Tensor:
        return (of_product * factor.flatten(1)).sum(1).to(ctx.scale_dtype)

    of_product = product_sums(g, x, weight, x_scale, x_bias, ctx.kernels)
    sums = sums.to(ctx.scale_dtype)
    gradients: list[Tensor | None] = [None] * 19
    gradients[0], gradients[1] = g, of_product
    gradients[6], gradients[7] = of_scale(of_product, weight), sums[0]
    if residual is not None:
        gradients[10] = sums[0]
    if residual_weight is None:
        gradients[8], gradients[9] = g, None if residual is None else sums[1]
    else:
        # These are sums of maps as they are, which cuBLAS has.
        of_residual = product_sums(g, residual, residual_weight, None, None, NO_PASSES.encoded())
        gradients[9] = of_scale(of_residual, residual_weight)
        gradients[11], gradients[12] = g, of_residual
    if ctx.needs_input_grad[14]:
        gradients[14] = dnext
    return tuple(gradients)


product_join.register_autograd(_gradients, setup_context=_save)
