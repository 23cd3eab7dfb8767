"""The grouped 3x3 convolution between two BatchNorms: who computes, its passes, and the operators.

`grouped_conv3x3` is what users call. Its backends:
    `torch`   PyTorch's own convolution: cuDNN on a GPU.
    `merged`  the same by wider groups, whose weights are filled up with zeros (library.py).
    `triton`  the kernels of this package, forward and backward; an error where they cannot run.
    `auto`    on a GPU the kernels for the passes in which the selection table of
              kernels/conv3x3/rows.py has seen them win on its architecture; `merged` where its
              other table has seen that win; `torch` for all else.

Beneath it are the PyTorch operators `coded_resnext::grouped_conv3x3*`, and beneath these `forward`
and `backward`, which autograd does not see. `Passes`, encoded as `kernels` for an operator, say who
computes: those passes run the Triton kernels, on CUDA tensors and in Triton's interpreter; the
others run PyTorch's convolution. Results of the size of the activations are channels-last. B
samples, N groups of width D.
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
from coded_resnext.kernels.backend import (
    LOGGER,
    ConvBackend,
    architecture_of_kernels,
    choose_passes,
    log_once,
)
from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.checks import check_affine, check_filled
from coded_resnext.kernels.layout import (
    accumulation_dtype,
    channels_last,
    on_device,
    operator,
)
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

from . import launch as conv3x3_launch
from . import rows as conv3x3_rows
from .library import merged_conv3x3
from .rows import GroupedSizes, merged_width, planned


def unsupported(x: Tensor, weight: Tensor, stride: int) -> str | None:
    """Returns why the kernels cannot run on `x [B, N*D, H, W]`; None if they can."""
    if stride not in (1, 2):
        return f"the kernels take strides 1 and 2, not {stride}"
    return layout.unsupported(x, width=weight.shape[1], widest=conv3x3_rows.WIDEST_WINDOW)


def sizes_of(weight: Tensor, stride: int) -> GroupedSizes:
    """Returns the sizes of a weight `[N*D, D, 3, 3]`, constants where a graph leaves sizes open."""
    channels, width = (int(size) for size in weight.shape[:2])
    return GroupedSizes(channels // width, width, int(stride))


# The compiler takes the result as it is: it follows no logger, and before torch 2.14 no cached
# class method. The sizes of the weight must be constants of the graph, which those of parameters
# are.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(arch: str, channels: int, width: int, stride: int, forced: bool) -> int:
    """Returns the encoded passes of a weight `[N*D, D, 3, 3]` that run kernels."""
    sizes = GroupedSizes(channels // width, width, stride)
    return choose_passes("grouped 3x3 convolution", sizes, arch, forced, planned).encoded()


def select_passes(x: Tensor, weight: Tensor, stride: int, backend: ConvBackend) -> Passes:
    """Returns the passes that run kernels, by the rule of `choose_passes`.

    Raises:
        ValueError, RuntimeError: as `architecture_of_kernels`.
    """
    arch = architecture_of_kernels(x, backend, unsupported(x, weight, stride))
    if arch is None:
        return NO_PASSES
    channels, width = weight.shape[:2]
    return Passes.decoded(_choose(arch, channels, width, stride, backend == "triton"))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose_width(arch: str, channels: int, width: int, stride: int, forced: bool) -> int:
    """Returns the channels of the groups that PyTorch is given, see `merged_width`."""
    sizes = GroupedSizes(channels // width, width, stride)
    chosen = merged_width(sizes, arch, forced=forced)
    if chosen != width:
        log_once(LOGGER, f"grouped 3x3 convolution, {sizes}, {arch}: by groups of {chosen}")
    return chosen


def _width_for_library(x: Tensor, weight: Tensor, stride: int, backend: ConvBackend) -> int:
    """Returns the channels of the groups that PyTorch is given for `x` in the dtype it has."""
    channels, width = weight.shape[:2]
    # Measured for 16 bits a number, channels last.
    measured = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    measured = measured and x.is_contiguous(memory_format=torch.channels_last)
    asked = backend == "merged" or (backend == "auto" and measured)
    if not asked or layout.transformed(x, weight):
        return width
    forced = backend == "merged"
    return int(_choose_width(layout.architecture_of(x), channels, width, stride, forced))


def grouped_conv3x3(
    x: Tensor,
    weight: Tensor,
    groups: int,
    *,
    stride: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    statistics: bool = False,
    backend: ConvBackend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Returns the grouped 3x3 convolution between two BatchNorms, with their elementwise parts.

    `y = conv(relu(scale x + bias))`, with one row and column of zeros around the map *after* the
    ReLU; and the sums from which the next BatchNorm's mean and variance follow. All arguments get
    gradients, through the statistics too, so that `scale` and `bias` may come from the statistics
    of another call: that is a training step of BatchNorm without a pass over a map of its own.

    Args:
        x: `[B, N*D, H, W]`, floating point; copied by the kernels unless channels-last.
        weight: `[N*D, D, 3, 3]` in the dtype of `x`; under autocast both are cast.
        groups: `N`.
        stride: 1, or 2 for every second row and column.
        scale: `[N*D]`; without it and `bias`, `x` itself is convolved.
        bias: `[N*D]`, given with `scale` or not at all.
        statistics: whether to return them.
        backend: see the module.

    Returns:
        `y [B, N*D, ceil(H / stride), ceil(W / stride)]` in the dtype of `x`, and float32 (float64
        for float64) `[3, N*D]`: the count of each channel's values, their sum, and M2, the sum of
        their squared deviations from their mean; None unless asked for.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype; the message names it.
        RuntimeError: the requested backend cannot run.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check(x, weight, groups, stride, scale, bias, rounds=autocast)
    alone = scale is None and not statistics
    if backend == "merged" and not alone:
        raise ValueError("backend: 'merged' takes no scale, bias or statistics")
    passes = select_passes(x, weight, stride, backend)
    if not any(passes) and alone:
        width = _width_for_library(x, weight, stride, backend)
        if width != weight.shape[1]:
            return merged_conv3x3(x, weight, stride, width), None
        return F.conv2d(x, weight.to(x.dtype), None, stride, 1, 1, groups), None
    weight = weight.to(x.dtype)
    y, sums = grouped_conv3x3_operator(x, weight, scale, bias, stride, statistics, passes.encoded())
    return y, sums if statistics else None


def _check(
    x: Tensor,
    weight: Tensor,
    groups: int,
    stride: int,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    rounds: bool,
) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x: expected a floating-point tensor [B, N*D, H, W], got {x.dtype} {list(x.shape)}"
        )
    check_filled("x", x)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    expected = [channels, channels // groups, 3, 3]
    dtype_fits = weight.dtype == x.dtype or (rounds and weight.is_floating_point())
    if list(weight.shape) != expected or not dtype_fits or weight.device != x.device:
        raise ValueError(
            f"weight: expected {expected} {x.dtype} on {x.device}, "
            f"got {list(weight.shape)} {weight.dtype} on {weight.device}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    check_affine(x, scale, bias)


@operator("grouped_conv3x3")
def grouped_conv3x3_operator(
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
    """Does what the operator does, without autograd and with the statistics in parts.

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


grouped_conv3x3_operator.register_autograd(_gradients, setup_context=_save)
