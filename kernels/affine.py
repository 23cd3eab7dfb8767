"""What surrounds a convolution between two BatchNorms, in plain PyTorch: the map before it, the
statistics of its output, and the gradient that reaches the output when the statistics are used.

Sums of gradients and statistics come in *parts*, one for each program of a kernel that took them;
PyTorch's are one part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import accumulation_dtype, channels_last


class Affine(NamedTuple):
    """BatchNorm as a map of each channel, `scale y + bias`, both `[C]` in float32 or float64."""

    scale: Tensor
    bias: Tensor


class ConvGradients(NamedTuple):
    """The gradients of a convolution of `relu(scale x + bias)`; None for what is not needed.

    Of a convolution of the sum that ends a block, the gradient of the sum before its ReLU.
    """

    input: Tensor | None
    sums: Tensor | None
    """In parts, `[parts, rows, channels]`: of the bias and of the scale of the map before it; of a
    sum, of its bias, of its scale and of its residual's, those that there are."""
    weight: Tensor | None


def statistics_of(y: Tensor) -> Tensor:
    """Returns (count, sum, M2) of each channel of `[B, C, H, W]`, `[1, 3, C]` in the accumulation
    dtype.

    M2 is the sum of squared deviations from the mean.
    """
    m2, mean = torch.var_mean(y.to(accumulation_dtype(y.dtype)), (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    return torch.stack([torch.full_like(mean, count), mean * count, m2 * count])[None]


def statistics_gradient(grad_statistics: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `curve`, `level [C]`: statistics pass the gradient `curve y + level` on to the output
    `y`.

    The derivative of M2 by a value is twice its deviation from the mean; the count has none.
    """
    curve = 2 * grad_statistics[2]
    return curve, grad_statistics[1] - curve * (statistics[1] / statistics[0])


def add_statistics_gradient(
    grad: Tensor, y: Tensor | None, gain: Tensor | None, curve: Tensor | None, level: Tensor | None
) -> Tensor:
    """Returns `gain grad + curve y + level` by channel, in the dtype of `grad`; absent terms left
    out.

    `grad`, `y [B, C, H, W]`; `gain`, `curve`, `level [C]`, the last two together with `y`.
    """
    if gain is None and y is None:
        return grad
    wide = grad.to(accumulation_dtype(grad.dtype))
    if gain is not None:
        wide = wide * gain[:, None, None]
    if y is not None and curve is not None and level is not None:
        wide = wide + (curve[:, None, None] * y + level[:, None, None])
    return wide.to(grad.dtype)


def activate(z: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns `relu(scale z + bias)` by channel, in the dtype of `z`; `z` itself without a map."""
    if scale is None or bias is None:
        return z
    wide = z.to(accumulation_dtype(z.dtype))
    return (wide * scale[:, None, None] + bias[:, None, None]).to(z.dtype).relu()


def behind_activation(
    grad_h: Tensor, z: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of `z` from that of `relu(scale z + bias)`, and sums `[1, 2, N*D]`.

    The sums are those of the gradient behind the affine map and of that times `z`: the gradients
    of `bias` and `scale`. There are none without a map.
    """
    if scale is None or bias is None:
        return channels_last(grad_h.to(z.dtype)), None
    wide = z.to(grad_h.dtype)
    scale, bias = scale[:, None, None], bias[:, None, None]
    grad = torch.where(wide * scale + bias > 0, grad_h, 0.0)
    sums = torch.stack([grad.sum((0, 2, 3)), (grad * wide).sum((0, 2, 3))])
    return channels_last((grad * scale).to(z.dtype)), sums[None]


def total(sums: Tensor | None, like: Tensor) -> Tensor:
    """Returns the sum of all parts, or `[0]` without any, in the accumulation dtype of `like`."""
    if sums is None:
        return like.new_empty((0,), dtype=accumulation_dtype(like.dtype))
    return sums.sum(0)


def split_sums(sums: Tensor, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of `scale` and `bias`."""
    return (None, None) if scale is None else (sums[1].to(scale.dtype), sums[0].to(scale.dtype))
