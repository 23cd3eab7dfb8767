"""The public grouped 3x3 convolution: validation, and the rule that picks who computes it.

Backends:
    `torch`   PyTorch's own convolution: cuDNN on a GPU.
    `merged`  the same by wider groups, whose weights are filled up with zeros (library.py).
    `triton`  the kernels of this package, forward and backward; an error where they cannot run.
    `auto`    on a GPU the kernels for the passes in which the selection table of
              kernels/conv3x3/rows.py has seen them win on its architecture; `merged` where its
              other table has seen that win; `torch` for all else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.backend import (
    LOGGER,
    ConvBackend,
    architecture_of_kernels,
    choose_passes,
    log_once,
)
from coded_resnext.kernels.checks import check_affine, check_filled
from coded_resnext.kernels.rows import NO_PASSES, Passes

from . import operator as conv3x3_operator
from .library import merged_conv3x3
from .rows import GroupedSizes, merged_width, planned


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
    arch = architecture_of_kernels(x, backend, conv3x3_operator.unsupported(x, weight, stride))
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
    y, sums = conv3x3_operator.grouped_conv3x3(
        x, weight, scale, bias, stride, statistics, passes.encoded()
    )
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
