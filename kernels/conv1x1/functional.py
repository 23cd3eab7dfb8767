"""The public 1x1 convolutions between BatchNorms: validation, and the rule that picks who computes.

Backends:
    `torch`   PyTorch's own products: cuBLAS on a GPU.
    `triton`  the kernels of this package in the passes for which the selection table of
              kernels/conv1x1/rows.py has them, `torch` in the others; an error where they cannot
              run.
    `auto`    on a GPU as `triton`, but only what has been measured to win; else `torch`.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from coded_resnext.kernels.backend import ConvBackend, check_conv_backend
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import architecture

from . import join_operator
from . import operator as conv1x1_operator
from .rows import ProductSizes, planned

logger = logging.getLogger(__name__)


@cache
def _report(choice: str) -> None:
    """Say a choice once."""
    logger.info(choice)


# The compiler takes the result as it is: it follows no logger, and before torch 2.14 no frozen
# dataclass into its text.
@torch.compiler.assume_constant_result
def _choose(arch: str, inputs: int, outputs: int, join: bool, forced: bool) -> str:
    """The passes of a weight `[O, I]` that run kernels, and the log's line; `forced` by name."""
    sizes = ProductSizes(inputs, outputs, join)
    plan = planned(arch, sizes)
    passes = plan.passes if plan.measured or forced else ""
    _report(f"1x1 convolution, {sizes}, {arch}: kernels for {passes or 'no pass'}: {plan.reason}")
    return passes


def select_products(x: Tensor, weight: Tensor, backend: ConvBackend, *, join: bool = False) -> str:
    """The passes (`forward`, `input`, `weight`) that run kernels, separated by spaces.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        backend: see the module.
        join: whether it is `join_conv1x1` that asks, and not `conv1x1`.

    Raises:
        RuntimeError: `triton` was asked for and cannot run here; the message says why.
    """
    check_conv_backend(backend)
    if backend == "torch":
        return ""
    reason = conv1x1_operator.unsupported(x)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend: 'triton' was asked for but cannot run: {reason}")
    if reason is not None or (backend == "auto" and not x.is_cuda):
        return ""
    arch = architecture(x.device.index) if x.is_cuda else "cpu"
    return _choose(arch, weight.shape[1], weight.shape[0], join, backend == "triton")


def conv1x1(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    statistics: bool = False,
    backend: ConvBackend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """A 1x1 convolution between two BatchNorms, with their elementwise parts.

    `y = W relu(scale x + bias)` at every pixel, and the sums from which the next BatchNorm's mean
    and variance follow. All arguments get gradients, through the statistics too.

    Args:
        x: `[B, I, H, W]`, floating point; copied unless channels-last.
        weight: `[O, I, 1, 1]` in the dtype of `x`; under autocast both are cast.
        scale, bias: `[I]`, both or neither; without them `y = W x`.
        statistics: whether to return them.
        backend: see the module.

    Returns:
        `y [B, O, H, W]`, channels-last in the dtype of `x`, and float32 (float64 for float64)
        `[3, O]`: the count of each channel's values, their sum, and M2, the sum of their squared
        deviations from their mean; None unless asked for.

    Raises:
        ValueError: an argument has the wrong rank, size or dtype; the message names it.
        RuntimeError: the requested backend cannot run.
    """
    x, weight = _autocast(x, weight)
    _check_map("x", x)
    _check_weight(x, weight)
    _check_affine("scale", scale, "bias", bias, x)
    passes = select_products(x, weight, backend)
    y, sums = conv1x1_operator.conv1x1(x, weight, scale, bias, statistics, False, passes)
    return y, sums if statistics else None


def join_conv1x1(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    residual_scale: Tensor | None = None,
    residual_bias: Tensor | None = None,
    statistics: bool = False,
    backend: ConvBackend = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The end of a residual block and the 1x1 convolution of the next, the map between them written
    once: `x = relu(scale y + bias + residual)`, `z = W x`.

    Args:
        y: `[B, I, H, W]`, what the last convolution of the block gave.
        scale, bias: `[I]`, its BatchNorm.
        residual: `[B, I, H, W]`, in the dtype of `y`.
        weight: `[O, I, 1, 1]` in the dtype of `y`; under autocast all three are cast.
        residual_scale, residual_bias: `[I]`, both or neither: the BatchNorm of a residual that a
            projection gave.
        statistics, backend: as for `conv1x1`.

    Returns:
        `x [B, I, H, W]`, `z [B, O, H, W]` and the statistics of `z`, as those of `conv1x1`.

    Raises:
        ValueError, RuntimeError: as `conv1x1`.
    """
    y, weight = _autocast(y, weight)
    residual = residual.to(y.dtype) if torch.is_autocast_enabled(y.device.type) else residual
    _check_map("y", y)
    _check_weight(y, weight)
    if residual.shape != y.shape or residual.dtype != y.dtype or residual.device != y.device:
        raise ValueError(
            f"residual: expected {list(y.shape)} {y.dtype} on {y.device}, "
            f"got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )
    _check_affine("scale", scale, "bias", bias, y)
    _check_affine("residual_scale", residual_scale, "residual_bias", residual_bias, y)
    passes = select_products(y, weight, backend, join=True)
    # Signs are read by the kernel alone; PyTorch would unpack them again.
    both = {"forward", "input"} <= set(passes.split())
    keep_signs = both and y.shape[1] % 8 == 0 and torch.is_grad_enabled()
    x, z, sums, _ = join_operator.join_conv1x1(
        y,
        scale,
        bias,
        residual,
        residual_scale,
        residual_bias,
        weight,
        statistics,
        keep_signs,
        False,
        passes,
    )
    return x, z, sums if statistics else None


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype)


def _check_map(name: str, x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor [B, I, H, W], got {x.dtype} {list(x.shape)}"
        )
    check_filled(name, x)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    fits = weight.ndim == 4 and weight.shape[0] > 0 and weight.shape[1:] == (x.shape[1], 1, 1)
    if not fits or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight: expected [O, {x.shape[1]}, 1, 1] {x.dtype} on {x.device}, "
            f"got {list(weight.shape)} {weight.dtype} on {weight.device}"
        )


def _check_affine(
    scale_name: str, scale: Tensor | None, bias_name: str, bias: Tensor | None, x: Tensor
) -> None:
    if (scale is None) != (bias is None):
        missing = scale_name if scale is None else bias_name
        raise ValueError(
            f"{missing}: expected a tensor, since the other of {scale_name} and {bias_name} is one"
        )
    for name, vector in ((scale_name, scale), (bias_name, bias)):
        if vector is None:
            continue
        if vector.shape != (x.shape[1],) or vector.device != x.device:
            raise ValueError(
                f"{name}: expected [{x.shape[1]}] on {x.device}, "
                f"got {list(vector.shape)} on {vector.device}"
            )
        if not vector.is_floating_point():
            raise ValueError(f"{name}: expected floating-point numbers, got {vector.dtype}")
