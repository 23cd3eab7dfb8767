"""The grouped 3x3 convolution in PyTorch: its definition, and its computation by wider groups.

`merged_conv3x3` fills weights up with zeros, since cuDNN is slow where groups are narrow: one group
of 32 channels that multiplies by zeros, seven eighths of its weight, can be faster than eight
groups of 4. Everything around the convolution stays as it was: the weight is merged in one launch
before it, and its gradient gathered in one behind.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reference(
    x: Tensor,
    weight: Tensor,
    groups: int,
    stride: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns the grouped convolution of `relu(scale x + bias)`, padded with zeros after the ReLU.

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


def merged_conv3x3(x: Tensor, weight: Tensor, stride: int, width: int) -> Tensor:
    """Returns the grouped convolution of `x [B, N*D, H, W]` by groups of `width` channels.

    A NaN or an infinity in one group reaches those that it is merged with.

    Args:
        x: in the dtype of the result.
        weight: `[N*D, D, 3, 3]` in a dtype of its own; it is rounded to that of `x`.
        stride: 1 or 2.
        width: a multiple of `D` that divides `N*D`.
    """
    channels = weight.shape[0]
    merged = _Merged.apply(weight, width // weight.shape[1], x.dtype)
    return F.conv2d(x, merged, None, stride, 1, 1, channels // width)


def merged_weight(weight: Tensor, together: int, dtype: torch.dtype) -> Tensor:
    """Returns a weight `[N*D, D, 3, 3]` as `[N*D, t*D, 3, 3]`, zero between the `t` groups."""
    channels, width = weight.shape[:2]
    parts = weight.view(-1, together, width, 1, width, 3, 3)
    if not _has_memory(weight):
        merged = parts * _diagonal(together, weight.dtype, weight.device)
        return merged.to(dtype).view(channels, together * width, 3, 3)
    # As cuDNN reads the weight of a channels-last map, so that it makes no copy of it.
    merged = weight.new_empty((channels, 3, 3, together * width), dtype=dtype).permute(0, 3, 1, 2)
    blocks = merged.view(-1, together, width, together, width, 3, 3)
    torch.mul(parts, _diagonal_once(together, weight.dtype, weight.device), out=blocks)
    return merged


def _has_memory(weight: Tensor) -> bool:
    """Returns whether a weight is neither traced nor fake, so that one launch can write into
    memory."""
    return not torch.compiler.is_compiling() and type(weight) in (Tensor, nn.Parameter)


def _diagonal(together: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(together, dtype=dtype, device=device).view(together, 1, together, 1, 1, 1)


_diagonal_once = cache(_diagonal)


class _Merged(torch.autograd.Function):
    """`merged_weight` with a gradient in the type and layout of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, together: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        return merged_weight(weight, together, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        width = weight.shape[1]
        together = grads[0].shape[1] // width
        blocks = grads[0].view(-1, together, width, together, width, 3, 3)
        own = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        if not _has_memory(weight):
            return own.reshape(weight.shape).to(weight.dtype), None, None
        gathered = torch.empty_like(weight)
        gathered.view(own.shape).copy_(own)
        return gathered, None, None
