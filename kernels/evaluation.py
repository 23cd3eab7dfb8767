"""The convolutions of evaluation as PyTorch operators `coded_resnext::folded_*`: BatchNorm is in
their weights and their biases, and what stands behind them is computed on the way out.

They have no gradients. The argument `kernels` is an encoded `Passes`, as for the convolutions of
training; results of the size of the activations are channels-last. B samples, N branches of width
D, I channels in, C or O channels out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coded_resnext.kernels.coded import gram
from coded_resnext.kernels.coded.operator import branch_energy
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.conv3x3 import launch as conv3x3_launch
from coded_resnext.kernels.conv3x3.convolution import sizes_of
from coded_resnext.kernels.recompute import launch as recompute_launch
from coded_resnext.kernels.residual import launch as residual_launch

from .checks import check_filled
from .layout import accumulation_dtype, channels_last, empty_rows, on_device, operator
from .rows import Passes


@operator("folded_conv1x1")
def folded_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    factor: Tensor | None,
    kernels: int,
) -> Tensor:
    """Returns `y = relu(factor W x + bias + residual)`.

    `x [B, I, H, W]`, `weight [O, I, 1, 1]`, `residual [B, O, H, W]`; `bias [O]` and `factor [B]`
    in the accumulation dtype. A factor needs a residual.
    """
    check_filled("x", x)
    passes = Passes.decoded(kernels)
    if passes.forward:
        with on_device(x):
            return recompute_launch.folded_forward(x, weight, bias, residual, factor)
    if residual is None:
        return conv1x1_library.activated(x, weight, bias.to(x.dtype))
    y = conv1x1_library.forward(x, weight)
    return residual_launch.forward(y, None, bias, residual, None, None, passes.pointwise, factor)


@operator("folded_grouped_conv3x3")
def folded_grouped_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_weight: Tensor | None,
    keep_mask: Tensor | None,
    stride: int,
    kernels: int,
) -> tuple[Tensor, Tensor]:
    """Computes `h = keep relu(conv(x) + bias)` and its energies (2), (10), (11).

    `x [B, N*D, H, W]`, `weight [N*D, D, 3, 3]`, `bias [N*D]` in the accumulation dtype,
    `branch_weight [N, C, D]`, `keep_mask [B, N]` of 0 and 1, which needs a `branch_weight`.

    Returns:
        `h [B, N*D, OH, OW]` and `E [B, N]` in the accumulation dtype, which is `[0]` without a
        `branch_weight`.
    """
    check_filled("x", x)
    sizes = sizes_of(weight, stride)
    accumulate = accumulation_dtype(x.dtype)
    if Passes.decoded(kernels).forward:
        form = None if branch_weight is None else gram.branch_forms(branch_weight, accumulate)
        with on_device(x):
            h, sums = conv3x3_launch.folded_forward(x, weight, sizes, bias, keep_mask, form)
        if branch_weight is None:
            return h, sums
        # The forms are positive semidefinite; rounding must not make an energy negative.
        return h, sums.clamp_min(0) / (branch_weight.shape[1] * h.shape[2] * h.shape[3])
    h = F.conv2d(x, weight, bias.to(x.dtype), stride, 1, 1, sizes.groups).relu_()
    if keep_mask is not None:
        h = h * keep_mask.repeat_interleave(sizes.width, 1)[:, :, None, None].to(h.dtype)
    h = channels_last(h)
    if branch_weight is None:
        return h, h.new_empty((0,), dtype=accumulate)
    return h, branch_energy(h, branch_weight, None, None, None)


@operator("side_by_side")
def side_by_side(h: Tensor, factor: Tensor | None, x: Tensor) -> Tensor:
    """Returns `[factor h, x]`, `[B, N*D + I, H, W]`: the operand of two 1x1 convolutions that are
    added.

    `h [B, N*D, H, W]`, `x [B, I, H, W]`, which may be strided; `factor [B]` or None.
    """
    check_filled("h", h)
    both = empty_rows(h, h.shape[1] + x.shape[1]).permute(0, 3, 1, 2)
    left, right = both[:, : h.shape[1]], both[:, h.shape[1] :]
    if factor is None:
        left.copy_(h)
    else:
        torch.mul(h, factor[:, None, None, None], out=left)
    right.copy_(x)
    return both
