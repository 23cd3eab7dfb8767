"""BatchNorm by running statistics inside the convolution before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fused_norm import running_affine


class Folded(NamedTuple):
    """A convolution and the BatchNorm behind it as one convolution, `W x + bias`."""

    weight: Tensor
    """In the shape of the convolution's, in the dtype of the activations."""
    bias: Tensor
    """`[C]` in float32 or float64."""

    def beside(self, other: Folded) -> Folded:
        """This convolution and another one, added: one convolution of both inputs side by side."""
        return Folded(torch.cat([self.weight, other.weight], 1), self.bias + other.bias)


def fold(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm, dtype: torch.dtype | None) -> Folded:
    """`bn(conv(x))` as one convolution; the arithmetic is float32, or float64 for such layers.

    Args:
        conv: without a bias.
        bn: with running statistics.
        dtype: of the weight that is returned, rounded once; None for the convolution's own.
    """
    scale, bias = running_affine(bn)
    wide = torch.promote_types(conv.weight.dtype, scale.dtype)
    weight = conv.weight.to(wide) * scale.to(wide)[:, None, None, None]
    return Folded(weight.to(dtype or conv.weight.dtype), bias)
