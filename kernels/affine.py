"""What surrounds a convolution between two BatchNorms, in plain PyTorch: the statistics of its
output, and the gradient that reaches the output when the statistics are used."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import accumulation_dtype, channels_last


def statistics_of(y: Tensor, wanted: bool = True) -> Tensor:
    """(count, sum, M2) of each channel of `[B, C, H, W]`, `[3, C]` in the accumulation dtype.

    M2 is the sum of squared deviations from the mean. `[0]` where they are not wanted.
    """
    wide = accumulation_dtype(y.dtype)
    if not wanted:
        return y.new_empty((0,), dtype=wide)
    m2, mean = torch.var_mean(y.to(wide), (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    return torch.stack([torch.full_like(mean, count), mean * count, m2 * count])


def statistics_gradient(grad_statistics: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """`curve`, `level [C]`: statistics pass the gradient `curve y + level` on to the output `y`.

    The derivative of M2 by a value is twice its deviation from the mean; the count has none.
    """
    curve = 2 * grad_statistics[2]
    return curve, grad_statistics[1] - curve * (statistics[1] / statistics[0])


def add_statistics_gradient(
    grad: Tensor, y: Tensor | None, gain: Tensor | None, curve: Tensor | None, level: Tensor | None
) -> Tensor:
    """`gain grad + curve y + level` by channel, in the dtype of `grad`; absent terms left out.

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
    """`relu(scale z + bias)` by channel, in the dtype of `z`; `z` itself without a map."""
    if scale is None or bias is None:
        return z
    wide = z.to(accumulation_dtype(z.dtype))
    return (wide * scale[:, None, None] + bias[:, None, None]).to(z.dtype).relu()


def behind_activation(
    grad_h: Tensor, z: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of `z` from that of `relu(scale z + bias)`, and the sums `[2, N*D]`.

    The sums are those of the gradient behind the affine map and of that times `z`: the gradients
    of `bias` and `scale`. Without a map they are empty.
    """
    if scale is None or bias is None:
        return channels_last(grad_h.to(z.dtype)), grad_h.new_empty((0,))
    wide = z.to(grad_h.dtype)
    scale, bias = scale[:, None, None], bias[:, None, None]
    grad = torch.where(wide * scale + bias > 0, grad_h, 0.0)
    sums = torch.stack([grad.sum((0, 2, 3)), (grad * wide).sum((0, 2, 3))])
    return channels_last((grad * scale).to(z.dtype)), sums


def split_sums(sums: Tensor, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of `scale` and `bias`."""
    return (None, None) if scale is None else (sums[1].to(scale.dtype), sums[0].to(scale.dtype))
