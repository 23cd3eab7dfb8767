"""The end of a residual block and the 1x1 convolution of the next one as PyTorch operators
`coded_resnext::join_conv1x1*`: the block's output is written once and multiplied on the way.

Kernels, layouts and letters as in kernels/conv1x1/operator.py. *Signs* are one bit for each element
of the block's output, set where it is above 0: `[B, H, W, I / 8]` bytes, the lowest bit first. With
them the gradient of the input reads one bit where it would read the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels.affine import add_statistics_gradient, statistics_gradient
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import accumulation_dtype, as_rows, empty_rows, on_device
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.residual.operator import fake_sums
from coded_resnext.kernels.rows import Passes

from . import launch as conv1x1_launch
from . import library as conv1x1_library
from .operator import fake_outputs


def pack_signs(x: Tensor) -> Tensor:
    """Returns the signs `[B, H, W, I / 8]` of `[B, I, H, W]`."""
    weights = 2 ** torch.arange(8, device=x.device)
    rows = as_rows(x)
    bits = (rows > 0).view(*rows.shape[:3], x.shape[1] // 8, 8)
    return (bits * weights).sum(-1).to(torch.uint8)


@torch.library.custom_op("coded_resnext::join_conv1x1", mutates_args=())
def join_conv1x1(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    statistics: bool,
    keep_signs: bool,
    deferred: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x = relu(scale y + bias + residual)`, `z = W x`.

    `y`, `residual [B, I, H, W]`, `weight [O, I, 1, 1]`; the others `[I]`. With `residual_scale` and
    `residual_bias` it is `residual_scale residual + residual_bias` that is added. With `deferred`
    the gradient of `y` goes out without its factor `scale`, and that of a residual with a map
    without `residual_scale`: as one tensor, to whoever made them with `deferred`.

    Returns:
        `x [B, I, H, W]`, `z [B, O, H, W]`, its (count, sum, M2) `[3, O]` in the accumulation dtype
        or `[0]` without `statistics`, and the signs of `x`, `[0]` without `keep_signs`.
    """
    check_filled("y", y)
    passes = Passes.decoded(kernels)
    if passes.forward:
        with on_device(y):
            return conv1x1_launch.join_forward(
                y,
                scale,
                bias,
                residual,
                residual_scale,
                residual_bias,
                weight,
                statistics,
                keep_signs,
            )
    pointwise = passes.pointwise
    x = residual_launch.forward(y, scale, bias, residual, residual_scale, residual_bias, pointwise)
    z = conv1x1_library.forward(x, weight)
    signs = pack_signs(x) if keep_signs else y.new_empty((0,), dtype=torch.uint8)
    return x, z, residual_launch.statistics(z, pointwise, statistics), signs


@join_conv1x1.register_fake
def _(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    statistics: bool,
    keep_signs: bool,
    deferred: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = y.shape
    shape = (batch, height, width, channels // 8) if keep_signs else (0,)
    signs = y.new_empty(shape, dtype=torch.uint8)
    return empty_rows(y).permute(0, 3, 1, 2), *fake_outputs(y, weight, statistics), signs


@torch.library.custom_op("coded_resnext::join_conv1x1_backward", mutates_args=())
def join_conv1x1_backward(
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
    need_input: bool,
    need_weight: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for that of `z`, `gain grad + curve z + level`, and `grad_x` for that of `x`.

    `grad`, `z [B, O, H, W]`; `gain`, `curve`, `level [O]`; `grad_x`, `x`, `y`, `residual
    [B, I, H, W]`. `signs`, where there are some, are read by the kernel in place of `x`; `residual`
    where it has a map, and `y` where it was written.

    Returns:
        `g [B, I, H, W]`, the gradient behind the ReLU, which is that of `y` without the factor
        `scale`. Then the sums of `g`, given a `y` of `g y`, given a `residual` of `g residual`,
        `[1 to 3, I]`: the gradients of `bias`, `scale`, `residual_scale`. And the gradient of
        `weight`. `[0]` in place of what is not needed.
    """
    check_filled("x", x)
    g, dweight = x.new_empty((0,)), x.new_empty((0,))
    sums = x.new_empty((0,), dtype=accumulation_dtype(x.dtype))
    passes = Passes.decoded(kernels)
    with on_device(x):
        if need_input and passes.input:
            g, sums, grad = conv1x1_launch.join_input_gradient(
                grad, grad_x, x, signs, y, residual, weight, z, gain, curve, level, need_weight
            )
        else:
            grad = add_statistics_gradient(grad, z, gain, curve, level)
        if need_weight and passes.weight:
            dweight = conv1x1_launch.weight_gradient(grad, x, weight, None, None)
    if need_input and not passes.input:
        of_x = conv1x1_library.input_gradient(grad, weight, grad_x)
        g, sums = residual_launch.backward(of_x, x, y, residual, passes.pointwise)
    if need_weight and not passes.weight:
        dweight = conv1x1_library.weight_gradient(grad, x, weight)
    return g, sums, dweight


@join_conv1x1_backward.register_fake
def _(
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
    need_input: bool,
    need_weight: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    g = empty_rows(x).permute(0, 3, 1, 2) if need_input else x.new_empty((0,))
    sums = fake_sums(x, y, residual) if need_input else fake_sums(x).new_empty((0,))
    dweight = weight.new_empty(tuple(weight.shape)) if need_weight else x.new_empty((0,))
    return g, sums, dweight


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    y, scale, _, residual, residual_scale, _, weight, ctx.statistics, _ = inputs[:9]
    ctx.deferred, ctx.kernels = inputs[9:]
    x, z, statistics, signs = output
    ctx.mark_non_differentiable(signs)
    mapped = (residual, residual_scale) if residual_scale is not None else (None, None)
    kept = (z, statistics) if ctx.statistics else (None, None)
    ctx.save_for_backward(y, scale, weight, x, signs if signs.numel() else None, *mapped, *kept)


def _gradients(ctx: Any, grad_x: Tensor, grad: Tensor, grad_statistics: Tensor, _: Any) -> Any:
    y, scale, weight, x, signs, residual, residual_scale, z, statistics = ctx.saved_tensors
    curve = level = None
    if ctx.statistics:
        curve, level = statistics_gradient(grad_statistics, statistics)
    need_input = any(ctx.needs_input_grad[:6])
    g, sums, dweight = join_conv1x1_backward(
        grad,
        grad_x,
        x,
        signs,
        y,
        residual,
        weight,
        z,
        None,
        curve,
        level,
        need_input,
        ctx.needs_input_grad[6],
        ctx.kernels,
    )
    gradients: list[Tensor | None] = [None] * 11
    if need_input:
        of_y, of_residual = g, g
        if not ctx.deferred:
            of_y = add_statistics_gradient(g, None, scale, None, None)
            of_residual = add_statistics_gradient(g, None, residual_scale, None, None)
        vectors = sums.to(scale.dtype)
        of_inputs = [of_y, vectors[1], vectors[0], of_residual]
        of_inputs += [] if residual_scale is None else [vectors[2], vectors[0]]
        wanted = ctx.needs_input_grad
        gradients[: len(of_inputs)] = [v if wanted[n] else None for n, v in enumerate(of_inputs)]
    if ctx.needs_input_grad[6]:
        gradients[6] = dweight
    return tuple(gradients)


join_conv1x1.register_autograd(_gradients, setup_context=_save)
