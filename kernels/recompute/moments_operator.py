"""The 1x1 convolution whose output is not written, as the PyTorch operators
`coded_resnext::recomputed_conv1x1*`: what BatchNorm needs follows from the moments of its input.

For `a = relu(scale x + bias)` and `y = W a`, over n pixels with the mean m of `a` and its scatter
`S = sum (a - m)(a - m)^T`, the sum of `y` is `n W m`, and its M2 the diagonal of `W S W^T`. What
reads `y` multiplies again (kernels/recompute/operator.py). B samples, I channels in, O channels
out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import behind_activation, split_sums
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.layout import accumulation_dtype, empty_rows, on_device
from coded_resnext.kernels.rows import Passes

from . import launch as recompute_launch


@torch.library.custom_op("coded_resnext::recomputed_conv1x1", mutates_args=())
def recomputed_conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, kernels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of `y = W relu(scale x + bias)`; without `scale` and `bias`, of `y = W x`.

    `x [B, I, H, W]`, `weight [O, I, 1, 1]`, `scale` and `bias [I]`; `kernels` as for `conv1x1`.

    Returns:
        Two tensors that hold one number each and are there for the gradients which `product_join`
        sends them: one like `y [B, O, H, W]`, for that of `y` without its factor for each channel;
        one `[O, I]`, for the sums of that gradient times `relu(scale x + bias)` over the pixels.
        Then the (count, sum, M2) of `y`, `[3, O]`, whose count has the factor as its gradient, as
        in `conv1x1`. Then the mean `[I]` and the scatter `[I, I]`, without gradients. All but the
        first are in the accumulation dtype.
    """
    check_filled("x", x)
    # They are statistics, and kernels compute those wherever they compute what is pointwise.
    passes = Passes.decoded(kernels)
    if passes.forward or passes.pointwise:
        with on_device(x):
            mean, scatter = recompute_launch.moments(x, scale, bias)
    else:
        mean, scatter = conv1x1_library.moments(affine.activate(x, scale, bias))
    statistics = _statistics(weight, mean, scatter, _pixels(x))
    return *_places(x, weight), statistics, mean, scatter


@recomputed_conv1x1.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, kernels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs, inputs = weight.shape[:2]
    wide = accumulation_dtype(x.dtype)
    shapes = ((3, outputs), (inputs,), (inputs, inputs))
    statistics, mean, scatter = (x.new_empty(shape, dtype=wide) for shape in shapes)
    return *_places(x, weight), statistics, mean, scatter


def _places(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, height, width = x.shape
    outputs, inputs = weight.shape[:2]
    single = x.new_zeros((), dtype=accumulation_dtype(x.dtype))
    return x.new_zeros(()).expand(batch, outputs, height, width), single.expand(outputs, inputs)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _precise(weight: Tensor) -> Tensor:
    """`[O, I]` in float64: products of such matrices are small, and TF32 may be on for float32."""
    return weight.flatten(1).double()


def _statistics(weight: Tensor, mean: Tensor, scatter: Tensor, count: int) -> Tensor:
    wide = _precise(weight)
    sums = count * (wide @ mean.double())
    # The scatter is positive semidefinite; rounding must not make a sum of squares negative.
    m2 = ((wide @ scatter.double()) * wide).sum(1).clamp_min(0)
    return torch.stack([torch.full_like(sums, count), sums, m2]).to(mean.dtype)


@torch.library.custom_op("coded_resnext::recomputed_conv1x1_backward", mutates_args=())
def recomputed_conv1x1_backward(
    grad: Tensor,
    grad_sums: Tensor,
    grad_statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    scatter: Tensor,
    need_input: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `x`, `[2, I]`, those of `bias` and `scale`, and the gradient of `weight`;
    `[0]` in place of the first two if they are not needed, or not there.

    With the gradients of the statistics, gain, level and half the curve of each channel, that of
    `a = relu(scale x + bias)` is `(gain W)^T grad + W^T curve W (a - m) + W^T level`.
    """
    check_filled("x", x)
    gain, level, half = grad_statistics.double().unbind()
    wide = _precise(weight)
    curved = 2 * half[:, None] * wide
    dweight = gain[:, None] * grad_sums.double() + curved @ scatter.double()
    dweight += torch.outer(level, _pixels(x) * mean.double())
    dweight = dweight.to(weight.dtype).view_as(weight)
    if not need_input:
        return x.new_empty((0,)), mean.new_empty((0,)), dweight
    square = wide.t() @ curved
    shift = level @ wide - square @ mean.double()
    of_output, square, shift = (
        each.to(mean.dtype) for each in (gain[:, None] * wide, square, shift)
    )
    if Passes.decoded(kernels).input:
        with on_device(x):
            dx, sums = recompute_launch.moments_gradient(
                grad, of_output, square, shift, x, scale, bias
            )
    else:
        h = affine.activate(x, scale, bias)
        of_activated = conv1x1_library.moments_gradient(grad, of_output, square, shift, h)
        dx, sums = behind_activation(of_activated.to(mean.dtype), x, scale, bias)
    return dx, sums, dweight


@recomputed_conv1x1_backward.register_fake
def _(
    grad: Tensor,
    grad_sums: Tensor,
    grad_statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    scatter: Tensor,
    need_input: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_rows(x).permute(0, 3, 1, 2) if need_input else x.new_empty((0,))
    sums = mean.new_empty((2, x.shape[1]) if need_input and scale is not None else (0,))
    return dx, sums, weight.new_empty(tuple(weight.shape))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.kernels = inputs
    mean, scatter = output[3:]
    ctx.mark_non_differentiable(mean, scatter)
    ctx.save_for_backward(*tensors, mean, scatter)


def _gradients(ctx: Any, grad: Tensor, grad_sums: Tensor, grad_statistics: Tensor, *_: Any) -> Any:
    x, weight, scale, bias, mean, scatter = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need_input = wanted[0] or wanted[2] or wanted[3]
    dx, sums, dweight = recomputed_conv1x1_backward(
        grad,
        grad_sums,
        grad_statistics,
        x,
        weight,
        scale,
        bias,
        mean,
        scatter,
        need_input,
        ctx.kernels,
    )
    dscale, dbias = split_sums(sums, scale) if need_input else (None, None)
    return dx if wanted[0] else None, dweight if wanted[1] else None, dscale, dbias, None


recomputed_conv1x1.register_autograd(_gradients, setup_context=_save)
