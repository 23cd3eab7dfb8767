"""The definition of the 1x1 convolution between two BatchNorms, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Returns the 1x1 convolution of `relu(scale x + bias)`, `[B, O, H, W]`.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        scale, bias: `[I]`; without them `x` itself is convolved.
    """
    if scale is not None and bias is not None:
        x = torch.relu(scale[:, None, None] * x + bias[:, None, None])
    return torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x)
