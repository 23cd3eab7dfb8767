"""The definition of the grouped 3x3 convolution between two BatchNorms, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_conv3x3(
    x: Tensor,
    weight: Tensor,
    groups: int,
    stride: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The grouped 3x3 convolution of `relu(scale x + bias)`, padded with zeros after the ReLU.

    Args:
        x: `[B, N*D, H, W]`.
        weight: `[N*D, D, 3, 3]`.
        groups: `N`.
        stride: of the output, `[B, N*D, OH, OW]` with `OH = ceil(H / stride)`.
        scale, bias: `[N*D]`; without them `x` itself is convolved.
    """
    if scale is not None and bias is not None:
        x = torch.relu(scale[:, None, None] * x + bias[:, None, None])
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, channels, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    grouped = padded.view(batch, groups, -1, height + 2, width + 2)
    taps = weight.reshape(groups, -1, *weight.shape[1:])
    y = x.new_zeros(batch, channels, -(-height // stride), -(-width // stride))
    for row in range(3):
        for column in range(3):
            shifted = grouped[..., row : row + height : stride, column : column + width : stride]
            y = y + torch.einsum("goi,bgihw->bgohw", taps[..., row, column], shifted).flatten(1, 2)
    return y
