"""The end of a residual block as the PyTorch operator `coded_resnext::join`.

Where a convolution follows, `join_conv1x1` does the same on its way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import accumulation_dtype, empty_rows

from . import launch as residual_launch


@torch.library.custom_op("coded_resnext::join", mutates_args=())
def join(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    deferred: bool,
    kernels: bool,
) -> Tensor:
    """`x = relu(scale y + bias + residual)`.

    Args:
        y, residual: `[B, C, H, W]`.
        scale, bias: `[C]`, the BatchNorm behind `y`.
        residual_scale, residual_bias: `[C]`, both or neither: the BatchNorm behind the residual.
        deferred: whether the gradients of `y`, and of a residual with a map, leave without their
            scale: one tensor then serves both. Whoever made them multiplies.
        kernels: whether the Triton kernels run.

    Returns:
        `[B, C, H, W]` in the dtype of `y`, channels-last.
    """
    check_filled("y", y)
    return residual_launch.forward(y, scale, bias, residual, residual_scale, residual_bias, kernels)


@join.register_fake
def _(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    deferred: bool,
    kernels: bool,
) -> Tensor:
    return empty_rows(y).permute(0, 3, 1, 2)


@torch.library.custom_op("coded_resnext::join_backward", mutates_args=())
def join_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None, kernels: bool
) -> tuple[Tensor, Tensor]:
    """The gradient behind the ReLU, and the sums of it, of it times `y` and times `residual`, the
    last two where those are there."""
    check_filled("x", x)
    return residual_launch.backward(grad, x, y, residual, kernels)


@join_backward.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None, kernels: bool
) -> tuple[Tensor, Tensor]:
    return empty_rows(x).permute(0, 3, 1, 2), fake_sums(x, y, residual)


def fake_sums(x: Tensor, *factors: Tensor | None) -> Tensor:
    """What the sums of a gradient like `x` are like, and of it times the factors that are there."""
    count = 1 + sum(factor is not None for factor in factors)
    return x.new_empty((count, x.shape[1]), dtype=accumulation_dtype(x.dtype))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    y, scale, _, residual, residual_scale, _, ctx.deferred, ctx.kernels = inputs
    mapped = (residual, residual_scale) if residual_scale is not None else (None, None)
    ctx.save_for_backward(output, y, scale, *mapped)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    x, y, scale, residual, residual_scale = ctx.saved_tensors
    g, sums = join_backward(grad, x, y, residual, ctx.kernels)
    sums = sums.to(scale.dtype)
    of_y = g if ctx.deferred else _scaled(g, scale)
    of_residual = g if ctx.deferred or residual_scale is None else _scaled(g, residual_scale)
    of_map = (None, None) if residual_scale is None else (sums[2], sums[0])
    return of_y, sums[1], sums[0], of_residual, *of_map, None, None


def _scaled(g: Tensor, scale: Tensor) -> Tensor:
    return (g.to(scale.dtype) * scale[:, None, None]).to(g.dtype)


join.register_autograd(_gradients, setup_context=_save)
