"""The 1x1 convolution between two BatchNorms as PyTorch operators `coded_resnext::conv1x1*`.

A pass (`forward`, `input`, `weight`) that the argument `kernels` names runs the Triton kernels, on
CUDA tensors and in Triton's interpreter; the others run PyTorch's products. Beside those the word
`pointwise` lets kernels compute the end of a block, its gradient and the statistics, where PyTorch
goes through the map several times. Results of the size of the activations are channels-last. B
samples, I channels in, O channels out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import behind_activation, follow, split_sums, statistics_gradient
from coded_resnext.kernels.backend import LOGGER, ConvBackend, check_conv_backend, say_once
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import (
    accumulation_dtype,
    architecture,
    empty_rows,
    on_device,
    unsupported,
)
from coded_resnext.kernels.residual import launch as residual_launch

from . import launch as conv1x1_launch
from . import library as conv1x1_library
from .rows import ProductSizes, planned

PASSES = "forward input weight"
POINTWISE = "pointwise"


# The compiler takes the result as it is: before torch 2.14 it follows no frozen dataclass into its
# text.
@torch.compiler.assume_constant_result
def _choose(arch: str, inputs: int, outputs: int, join: bool, forced: bool) -> str:
    """The passes of a weight `[O, I]` that run kernels, and the log's line; `forced` by name."""
    sizes = ProductSizes(inputs, outputs, join)
    plan = planned(arch, sizes)
    passes = plan.passes if plan.measured or forced else ""
    kernels = f"kernels for {passes or 'no pass'}: {plan.reason}"
    say_once(LOGGER, f"1x1 convolution, {sizes}, {arch}: {kernels}")
    return passes


def select_products(x: Tensor, weight: Tensor, backend: ConvBackend, *, join: bool = False) -> str:
    """The passes (`forward`, `input`, `weight`) that run kernels, separated by spaces.

    `triton` takes the kernels for the passes that the selection table of kernels/conv1x1/rows.py
    names, `auto` only for those that have been measured to win on a GPU.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        backend: who is to compute.
        join: whether it is `join_conv1x1` that asks, and not `conv1x1`.

    Raises:
        RuntimeError: `triton` was asked for and cannot run here; the message says why.
    """
    check_conv_backend(backend)
    if backend == "torch":
        return ""
    reason = unsupported(x)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend: 'triton' was asked for but cannot run: {reason}")
    if reason is not None or (backend == "auto" and not x.is_cuda):
        return ""
    arch = architecture(x.device.index) if x.is_cuda else "cpu"
    return _choose(arch, weight.shape[1], weight.shape[0], join, backend == "triton")


@torch.library.custom_op("coded_resnext::conv1x1", mutates_args=())
def conv1x1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
    deferred: bool,
    kernels: str,
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
    if "forward" in kernels.split():
        with on_device(x):
            return conv1x1_launch.forward(x, weight, scale, bias, statistics)
    y = conv1x1_library.forward(affine.activate(x, scale, bias), weight)
    return y, residual_launch.statistics(y, POINTWISE in kernels.split(), statistics)


@conv1x1.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
    deferred: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    return fake_outputs(x, weight, statistics)


def fake_outputs(x: Tensor, weight: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
    """What the output of a 1x1 convolution and its statistics are like."""
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
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for that of the output, `gain grad + curve y + level`.

    `gain`, `curve`, `level [O]`; `y`, `curve` and `level` go together.

    Returns:
        The gradient of `x` and `[2, I]`, those of `bias` and `scale`, and the gradient of
        `weight`; `[0]` in place of what is not needed or not there.
    """
    check_filled("x", x)
    dx, dweight = x.new_empty((0,)), x.new_empty((0,))
    sums = x.new_empty((0,), dtype=accumulation_dtype(x.dtype))
    chosen = kernels.split()
    with on_device(x):
        if need_input and "input" in chosen:
            dx, sums, grad = conv1x1_launch.input_gradient(
                grad, weight, x, scale, bias, y, gain, curve, level, need_weight
            )
        else:
            grad = follow(grad, y, gain, curve, level)
        if need_weight and "weight" in chosen:
            dweight = conv1x1_launch.weight_gradient(grad, x, weight, scale, bias)
    if need_input and "input" not in chosen:
        found = conv1x1_library.input_gradient(grad, weight)
        dx, sums = behind_activation(found.to(accumulation_dtype(x.dtype)), x, scale, bias)
    if need_weight and "weight" not in chosen:
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
    kernels: str,
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
