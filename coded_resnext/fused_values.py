"""What a block hands to the next while its last BatchNorm has not been applied yet.

B samples, C channels, H x W maps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .kernels.join_operator import join


class Affine(NamedTuple):
    """BatchNorm as a map of each channel, `scale y + bias`, both `[C]` in float32 or float64."""

    scale: Tensor
    bias: Tensor


class Deferred(NamedTuple):
    """The output of a block, `x = relu(scale raw + bias + residual)`, not yet computed.

    Who reads it applies the maps while loading, and writes `x` once.
    """

    raw: Tensor
    """`[B, C, H, W]`, what the last convolution gave."""
    affine: Affine
    """Of the last BatchNorm."""
    residual: Tensor
    """`[B, C, H, W]`: the block's input, or what the convolution of its skip connection gave."""
    residual_affine: Affine | None
    """Of the BatchNorm of the skip connection; None for the identity."""
    deferred: bool
    """Whether the gradient of `raw`, and of a residual with a map, is that of the *mapped* tensor,
    so that one tensor serves both. `fused_norm.affine_of` then hands the scale that is missing to
    whoever made the raw tensor."""
    kernels: bool
    """Whether Triton kernels compute `x`."""


Map = Tensor | Deferred


def ready(x: Map) -> Tensor:
    """The map itself, `[B, C, H, W]`."""
    if isinstance(x, Tensor):
        return x
    of_residual = x.residual_affine or (None, None)
    applied: Tensor = join(x.raw, *x.affine, x.residual, *of_residual, x.deferred, x.kernels)
    return applied


def like(x: Map) -> Tensor:
    """A tensor with the map's shape, dtype and device."""
    return x if isinstance(x, Tensor) else x.raw


def layers_of(skip: nn.Module) -> tuple[Any, ...]:
    """The convolution and the BatchNorm of a skip connection; none for the identity."""
    return tuple(skip) if isinstance(skip, nn.Sequential) else ()
