"""The 1x1 convolution between two BatchNorms as PyTorch operators `coded_resnext::conv1x1*`.

The argument `kernels` is an encoded `Passes`: those passes run the Triton kernels, on CUDA tensors
and in Triton's interpreter; the others run PyTorch's products. Around these, `pointwise` lets
kernels compute the end of a block, its gradient and the statistics, where PyTorch goes through the
map several times. Results of the size of the activations are channels-last. B samples, I channels
in, O channels out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import (
    add_statistics_gradient,
    behind_activation,
    split_sums,
    statistics_gradient,
)
from coded_resnext.kernels.backend import ConvBackend, architecture_of_kernels, choose_passes
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import (
    accumulation_dtype,
    empty_rows,
    on_device,
    unsupported,
)
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

from . import launch as conv1x1_launch
from . import library as conv1x1_library
from .rows import ProductSizes, planned


# The compiler takes the result as it is: it follows no logger, and that of torch 2.11 with Python
# 3.12 no frozen dataclass into its text. The sizes of the weight must be constants of the graph,
# which those of parameters are.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(arch: str, inputs: int, outputs: int, join: bool, forced: bool) -> int:
    """Returns the encoded passes of a weight `[O, I]` that run kernels; `forced` by name."""
    sizes = ProductSizes(inputs, outputs, join)
    return choose_passes("1x1 convolution", sizes, arch, forced, planned).encoded()


def select_products(
    x: Tensor, weight: Tensor, backend: ConvBackend, *, join: bool = False
) -> Passes:
    """Returns the passes that run kernels, by the rule of `choose_passes`.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        backend: who is to compute.
        join: whether it is `join_conv1x1` that asks, and not `conv1x1`.

    Raises:
        ValueError, RuntimeError: as `architecture_of_kernels`.
    """
    arch = architecture_of_kernels(x, backend, unsupported(x))
    if arch is None:
        return NO_PASSES
    outputs, inputs = weight.shape[:2]
    return Passes.decoded(_choose(arch, inputs, outputs, join, backend == "triton"))


@torch.library.custom_op("coded_resnext::conv1x1", mutates_args=())
def conv1x1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
    deferred: bool,
    kernels: int,
) -> tuple[Tensor, Tensor]:
    """`y = W relu(scale x + bias)` at every pixel; without `scale` and `bias`, `y = W x`.

    `x [B, I, H, W]`, `weight [O, I, 1, 1]`, `scale` and `bias [I]`. With `deferred`, which needs
    `statistics`, the gradient of `y` is to come without a factor for each channel, and this factor
    as the gradient of the count, which has no other. So `join_conv1x1` gives one gradient to two.

    Returns:
        `y [B, O, H, W]`, and its (count, sum, M2) `[3, O]` in the accumulation dtype, which a
        kernel takes before `y` is rounded; `[0]` without `statistics`.
    """
    check_filled("x", x)
    passes = Passes.decoded(kernels)
    if passes.forward:
        with on_device(x):
            return conv1x1_launch.forward(x, weight, scale, bias, statistics)
    y = conv1x1_library.forward(affine.activate(x, scale, bias), weight)
    return y, residual_launch.statistics(y, passes.pointwise, statistics)


@conv1x1.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
    deferred: bool,
    kernels: int,
) -> tuple[Tensor, Tensor]:
    return fake_outputs(x, weight, statistics)


def fake_outputs(x: Tensor, weight: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
    """Returns what the output of a 1x1 convolution and its statistics are like."""
    y = empty_rows(x, weight.shape[0]).permute(0, 3, 1, 2)
    shape = (3, weight.shape[0]) if statistics else (0,)
    return y, x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("coded_resnext::conv1x1_backward", mutates_args=())
def conv1x1_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    need_input: bool,
    need_weight: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients for that of the output, `gain grad + curve y + level`.

    `gain`, `curve`, `level [O]`; `y`, `curve` and `level` go together.

    Returns:
        The gradient of `x` and `[2, I]`, those of `bias` and `scale`, and the gradient of
        `weight`; `[0]` in place of what is not needed or not there.
    """
    check_filled("x", x)
    dx, dweight = x.new_empty((0,)), x.new_empty((0,))
    sums = x.new_empty((0,), dtype=accumulation_dtype(x.dtype))
    passes = Passes.decoded(kernels)
    with on_device(x):
        if need_input and passes.input:
            dx, sums, grad = conv1x1_launch.input_gradient(
                grad, weight, x, scale, bias, y, gain, curve, level, need_weight
            )
        else:
            grad = add_statistics_gradient(grad, y, gain, curve, level)
        if need_weight and passes.weight:
            dweight = conv1x1_launch.weight_gradient(grad, x, weight, scale, bias)
    if need_input and not passes.input:
        of_activated = conv1x1_library.input_gradient(grad, weight)
        dx, sums = behind_activation(of_activated.to(accumulation_dtype(x.dtype)), x, scale, bias)
    if need_weight and not passes.weight:
        activated = affine.activate(x, scale, bias)
        dweight = conv1x1_library.weight_gradient(grad, activated, weight)
    return dx, sums, dweight


@conv1x1_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    need_input: bool,
    need_weight: bool,
    kernels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_rows(x).permute(0, 3, 1, 2) if need_input else x.new_empty((0,))
    dweight = weight.new_empty(tuple(weight.shape)) if need_weight else x.new_empty((0,))
    shape = (2, x.shape[1]) if need_input and scale is not None else (0,)
    return dx, x.new_empty(shape, dtype=accumulation_dtype(x.dtype)), dweight


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, scale, bias, ctx.statistics, ctx.deferred, ctx.kernels = inputs
    y, statistics = output
    # The output is kept only where the gradient of its statistics needs it.
    kept = (y, statistics) if ctx.statistics else (None, None)
    ctx.save_for_backward(x, weight, scale, bias, *kept)


def _gradients(ctx: Any, grad: Tensor, grad_statistics: Tensor) -> Any:
    x, weight, scale, bias, y, statistics = ctx.saved_tensors
    gain = curve = level = None
    if ctx.statistics:
        curve, level = statistics_gradient(grad_statistics, statistics)
    if ctx.deferred:
        gain = grad_statistics[0]
    need_input = any(ctx.needs_input_grad[i] for i in (0, 2, 3))
    dx, sums, dweight = conv1x1_backward(
        grad,
        x,
        weight,
        scale,
        bias,
        y,
        gain,
        curve,
        level,
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


conv1x1.register_autograd(_gradients, setup_context=_save)
