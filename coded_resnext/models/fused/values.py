"""What a block hands to the next while its last BatchNorm has not been applied yet.

B samples, C channels, H x W maps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from coded_resnext.kernels.recompute.operator import product_join
from coded_resnext.kernels.residual.operator import join
from coded_resnext.kernels.rows import NO_PASSES, Passes


class Affine(NamedTuple):
    """BatchNorm as a map of each channel, `scale y + bias`, both `[C]` in float32 or float64."""

    scale: Tensor
    bias: Tensor


class Product(NamedTuple):
    """A 1x1 convolution `W relu(scale x + bias)`, or `W x`, whose statistics are known and that is
    computed where it is read. Its gradients go to whoever took the statistics, in two places."""

    handle: Tensor
    """Placeholder of the convolution's output, `[B, O, H, W]`, without memory."""
    sums_handle: Tensor
    """`[O, I]`, also without memory."""
    operand: Tensor
    """`x [B, I, H, W]`, raw."""
    affine: Affine | None
    weight: Tensor
    """`[O, I, 1, 1]`."""
    passes: Passes
    """Passes that run kernels."""


class Deferred(NamedTuple):
    """The output of a block, `x = relu(scale raw + bias + residual)`, not yet computed.

    Who reads it applies the maps while loading, and writes `x` once.
    """

    raw: Tensor | Product
    """`[B, C, H, W]`, what the last convolution gave, or what will give it."""
    affine: Affine
    """Scale and bias of the last BatchNorm."""
    residual: Tensor | Product
    """`[B, C, H, W]`: the block's input, or what the convolution of its skip connection gave; what
    will give it, only where that is so of `raw`."""
    residual_affine: Affine | None
    """Of the BatchNorm of the skip connection; None for the identity."""
    deferred: bool
    """Whether the gradient of `raw`, and of a residual with a map, is that of the *mapped* tensor,
    so that one tensor serves both. `fused_norm.affine_of` then hands the scale that is missing to
    whoever made the raw tensor."""
    kernels: bool
    """Says whether Triton kernels compute `x`."""


Map = Tensor | Deferred


def ready(x: Map) -> Tensor:
    """Returns the map itself, `[B, C, H, W]`."""
    if not isinstance(x, Deferred):
        return x
    if isinstance(x.raw, Product):
        return joined_product(x, x.raw)[0]
    of_residual = x.residual_affine or (None, None)
    assert isinstance(x.residual, Tensor)
    applied: Tensor = join(x.raw, *x.affine, x.residual, *of_residual, x.deferred, x.kernels)
    return applied


def joined_product(
    x: Deferred,
    product: Product,
    next_weight: Tensor | None = None,
    *,
    statistics: bool = False,
    signs: bool = False,
    passes: Passes = NO_PASSES,
) -> tuple[Tensor, Tensor, Tensor]:
    """A map whose raw tensor is a product, the next 1x1 convolution of it, and its statistics.

    Args:
        x, product: the map, and the product in it.
        next_weight: of the next convolution; without it the two others are empty.
        statistics, signs: whether they are taken, and kept.
        passes: of the next convolution, those that run kernels.
    """
    residual = x.residual
    convolution: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(residual, Product):
        convolution = (residual.handle, residual.sums_handle, residual.weight)
        residual = residual.operand
    assert product.affine is not None
    joined, y, sums, _ = product_join(
        product.handle,
        product.sums_handle,
        product.operand,
        *product.affine,
        product.weight,
        *x.affine,
        residual,
        *(x.residual_affine or (None, None)),
        *convolution,
        next_weight,
        statistics,
        signs,
        product.passes.encoded(),
        passes.encoded(),
    )
    return joined, y, sums


def like(x: Map) -> Tensor:
    """Returns a tensor with the map's shape, dtype and device."""
    if not isinstance(x, Deferred):
        return x
    return x.raw.handle if isinstance(x.raw, Product) else x.raw


def layers_of(skip: nn.Module) -> tuple[Any, ...]:
    """Returns the convolution and the BatchNorm of a skip connection; none for the identity."""
    return tuple(skip) if isinstance(skip, nn.Sequential) else ()
