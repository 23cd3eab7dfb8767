"""The grouped 3x3 convolution as PyTorch operators `coded_resnext::grouped_conv3x3*`.

The argument `kernels` is an encoded `Passes`: those passes run the Triton kernels, on CUDA tensors
and in Triton's interpreter; the others run PyTorch's convolution. Results of the size of the
activations are channels-last. B samples, N groups of width D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coded_resnext.kernels import affine, layout
from coded_resnext.kernels.affine import (
    ConvGradients,
    add_statistics_gradient,
    behind_activation,
    split_sums,
    statistics_gradient,
    total,
)
from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import (
    accumulation_dtype,
    channels_last,
    on_device,
    operator,
)
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import Passes

from . import launch as conv3x3_launch
from . import rows as conv3x3_rows
from .rows import GroupedSizes


def unsupported(x: Tensor, weight: Tensor, stride: int) -> str | None:
    """Returns why the kernels cannot run on `x [B, N*D, H, W]`; None if they can."""
    if stride not in (1, 2):
        return f"the kernels take strides 1 and 2, not {stride}"
    return layout.unsupported(x, width=weight.shape[1], widest=conv3x3_rows.WIDEST_WINDOW)


def sizes_of(weight: Tensor, stride: int) -> GroupedSizes:
    """Returns the sizes of a weight `[N*D, D, 3, 3]`, constants where a graph leaves sizes open."""
    channels, width = (int(size) for size in weight.shape[:2])
    return GroupedSizes(channels // width, width, int(stride))


@operator("grouped_conv3x3")
def grouped_conv3x3(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    statistics: bool,
    kernels: int,
) -> tuple[Tensor, Tensor]:
    """Returns the convolution of `relu(scale x + bias)`, padded with zeros after the ReLU.

    `x [B, N*D, H, W]`, `weight [N*D, D, 3, 3]`, `scale` and `bias [N*D]`.

    Returns:
        `y [B, N*D, OH, OW]`, and its (count, sum, M2) `[3, N*D]` in the accumulation dtype, which
        a kernel takes before `y` is rounded; `[0]` without `statistics`.
    """
    passes = Passes.decoded(kernels)
    y, partial = forward(x, weight, scale, bias, stride, statistics, passes)
    if partial is None:
        return y, x.new_empty((0,), dtype=accumulation_dtype(x.dtype))
    return y, batch_norm_launch.merged(partial, passes.forward)


def prepared(
    weight: Tensor, others: Sequence[Tensor], dtype: torch.dtype, stride: int, passes: Passes
) -> tuple[Tensor | None, list[Tensor]]:
    """Returns a weight as the kernels of both passes read it, in the dtype of their activations,
    None where they do not run, and up to three others in that dtype; all by one launch."""
    if passes.forward or passes.input:
        with on_device(weight):
            return conv3x3_launch.pack(weight, sizes_of(weight, stride), dtype, others)
    casts = [torch.empty_like(other, dtype=dtype) for other in others]
    if casts:
        torch._foreach_copy_(casts, list(others))
    return None, casts


def forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    statistics: bool,
    passes: Passes,
    of_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Does what `grouped_conv3x3` does, without autograd and with the statistics in parts.

    The weight has a dtype of its own, and is rounded to that of `x`; `of_weight` is what
    `prepared` has made of it.
    """
    check_filled("x", x)
    sizes = sizes_of(weight, stride)
    if passes.forward:
        with on_device(x):
            return conv3x3_launch.forward(x, weight, sizes, scale, bias, statistics, of_weight)
    activated = affine.activate(x, scale, bias)
    weight = weight.to(x.dtype)
    y = channels_last(F.conv2d(activated, weight, None, stride, 1, 1, sizes.groups))
    if not statistics:
        return y, None
    return y, residual_launch.statistics(y, passes.pointwise)


@operator("grouped_conv3x3_backward")
def grouped_conv3x3_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    stride: int,
    need_input: bool,
    need_weight: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients for that of the output, `grad + curve y + level` with `curve`, `level
    [N*D]`.

    Returns:
        The gradient of `x` and `[2, N*D]`, those of `bias` and `scale`, and the gradient of
        `weight`; `[0]` for what is not needed or not there.
    """
    of_output = (grad, y, curve, level)
    passes = Passes.decoded(kernels)
    dx, sums, dweight = backward(
        *of_output, x, weight, scale, bias, stride, need_input, need_weight, passes
    )
    nothing = x.new_empty((0,))
    return nothing if dx is None else dx, total(sums, x), nothing if dweight is None else dweight


def backward(
    grad: Tensor,
    y: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    need_input: bool,
    need_weight: bool,
    passes: Passes,
    of_weight: Tensor | None = None,
) -> ConvGradients:
    """Does what `grouped_conv3x3_backward` does, with the sums in parts.

    The weight, and so its gradient, has a dtype of its own; `of_weight` as for `forward`.
    """
    check_filled("x", x)
    sizes = sizes_of(weight, stride)
    accumulate = accumulation_dtype(x.dtype)
    dx = sums = dweight = None
    with on_device(x):
        if need_input and passes.input:
            map_size = (x.shape[2], x.shape[3])
            dx, sums = conv3x3_launch.input_gradient(
                grad, weight, sizes, map_size, y, curve, level, x, scale, bias, of_weight
            )
        if need_weight and passes.weight:
            own = (weight.dtype, conv3x3_launch.is_last(weight))
            of_output = (grad, sizes, y, curve, level)
            dweight = conv3x3_launch.weight_gradient(*of_output, x, scale, bias, *own)
    by_library = need_weight and not passes.weight
    mask = [need_input and not passes.input, by_library, False]
    if any(mask):
        grad = add_statistics_gradient(grad, y, None, curve, level)
        activated = affine.activate(x, scale, bias)
        plain = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], sizes.groups)
        of_inputs = torch.ops.aten.convolution_backward(
            grad, activated, weight.to(grad.dtype), *plain, mask
        )
        if mask[0]:
            dx, sums = behind_activation(of_inputs[0].to(accumulate), x, scale, bias)
        if mask[1]:
            dweight = of_inputs[1].to(weight.dtype).contiguous()
    return ConvGradients(dx, sums, dweight)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, scale, bias, ctx.stride, ctx.statistics, ctx.kernels = inputs
    y, statistics = output
    # The output is kept only where the gradient of its statistics needs it.
    kept = (y, statistics) if ctx.statistics else (None, None)
    ctx.save_for_backward(x, weight, scale, bias, *kept)


def _gradients(ctx: Any, grad: Tensor, grad_statistics: Tensor) -> Any:
    x, weight, scale, bias, y, statistics = ctx.saved_tensors
    curve = level = None
    if ctx.statistics:
        curve, level = statistics_gradient(grad_statistics, statistics)
    need_input = any(ctx.needs_input_grad[i] for i in (0, 2, 3))
    dx, sums, dweight = grouped_conv3x3_backward(
        grad,
        x,
        weight,
        scale,
        bias,
        y,
        curve,
        level,
        ctx.stride,
        need_input,
        ctx.needs_input_grad[1],
        ctx.kernels,
    )
    dscale, dbias = split_sums(sums, scale) if need_input else (None, None)
    return (
        dx if ctx.needs_input_grad[0] else None,
        dweight if ctx.needs_input_grad[1] else None,
        dscale,
        dbias,
        None,
        None,
        None,
    )


grouped_conv3x3.register_autograd(_gradients, setup_context=_save)
