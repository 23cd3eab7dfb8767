"""The definition of the residual sum that ends a block, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def join(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor:
    """The end of a residual block: `relu(scale y + bias + residual)`, the residual through a map of
    its own where it has one. Maps `[B, C, H, W]`, vectors `[C]`."""
    if residual_scale is not None and residual_bias is not None:
        residual = residual_scale[:, None, None] * residual + residual_bias[:, None, None]
    return torch.relu(scale[:, None, None] * y + bias[:, None, None] + residual)


def channel_statistics(y: Tensor) -> Tensor:
    """Count, sum and sum of squared deviations from the mean of each channel: `[3, C]`."""
    values = y.transpose(0, 1).flatten(1)
    total = values.sum(1)
    mean = total / values.shape[1]
    squares = (values - mean[:, None]).square().sum(1)
    return torch.stack([torch.full_like(total, values.shape[1]), total, squares])
