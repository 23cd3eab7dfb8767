"""The end of a residual block: its definition, and the Triton kernels or PyTorch that compute it.

Nothing is checked here. Maps are `[B, C, H, W]`, channels-last ones are not copied; results of
their size are channels-last. Vectors are `[C]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.affine import add_statistics_gradient, statistics_of
from coded_resnext.kernels.layout import (
    DTYPES,
    accumulation_dtype,
    as_float32,
    as_rows,
    channels_last,
    empty_float32,
    empty_rows,
    on_device,
    pixels_of,
)

from . import rows as residual_rows


def reference(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor:
    """Defines the end of a residual block: `relu(scale y + bias + residual)`.

    The residual goes through a map of its own where it has one.
    """
    if residual_scale is not None and residual_bias is not None:
        residual = residual_scale[:, None, None] * residual + residual_bias[:, None, None]
    return torch.relu(scale[:, None, None] * y + bias[:, None, None] + residual)


def reference_statistics(y: Tensor) -> Tensor:
    """Defines the statistics: count, sum and M2 of each channel, `[3, C]`."""
    values = y.transpose(0, 1).flatten(1)
    total = values.sum(1)
    mean = total / values.shape[1]
    squares = (values - mean[:, None]).square().sum(1)
    return torch.stack([torch.full_like(total, values.shape[1]), total, squares])


def forward(
    y: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    kernels: bool,
    factor: Tensor | None = None,
) -> Tensor:
    """Returns `relu(factor scale y + bias + residual)`, a residual with a map of its own mapped
    first.

    `factor [B]` is one number a sample; without it, or without `scale`, they are 1.
    """
    if not kernels:
        wide = y.to(accumulation_dtype(y.dtype))
        if scale is not None:
            wide = wide * scale[:, None, None]
        if factor is not None:
            wide = wide * factor[:, None, None, None]
        wide = wide + bias[:, None, None]
        if residual_scale is not None and residual_bias is not None:
            mapped = residual.to(wide.dtype) * residual_scale[:, None, None]
            residual = mapped + residual_bias[:, None, None]
        return channels_last((wide + residual).relu().to(y.dtype))
    rows = as_rows(y)
    x = empty_rows(y)
    count, channels = pixels_of(rows), rows.shape[3]
    row = residual_rows.pointwise_join(
        channels,
        DTYPES[y.dtype],
        mapped=residual_scale is not None,
        folded=scale is None,
        factor=factor is not None,
    )
    with on_device(y):
        row.launch(
            residual_rows.grid_of(count, channels),
            x,
            rows,
            as_float32(scale),
            as_float32(bias),
            as_rows(residual),
            as_float32(residual_scale),
            as_float32(residual_bias),
            as_float32(factor),
            count,
            rows.shape[1] * rows.shape[2],
        )
    return x.permute(0, 3, 1, 2)


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None, kernels: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradient behind the ReLU, `g = grad` where `x > 0`, and sums of it in parts.

    The sums, `[parts, 1 to 3, C]`, are those of `g`, with a `y` of `g y` and with a `residual` of
    `g residual`.
    """
    factors = [each for each in (y, residual) if each is not None]
    if not kernels:
        g = torch.where(x > 0, grad, 0.0)
        wide = g.to(accumulation_dtype(x.dtype))
        products = [wide, *(wide * factor for factor in factors)]
        return channels_last(g), torch.stack([each.sum((0, 2, 3)) for each in products])[None]
    rows = as_rows(x)
    g = empty_rows(x)
    count, channels = pixels_of(rows), rows.shape[3]
    partial = empty_float32(x, residual_rows.parts_of(count), 1 + len(factors), channels)
    row = residual_rows.pointwise_join_backward(
        channels, DTYPES[x.dtype], mapped=residual is not None, raw=y is not None
    )
    with on_device(x):
        row.launch(
            residual_rows.grid_of(count, channels),
            g,
            partial,
            as_rows(grad),
            rows,
            None if y is None else as_rows(y),
            None if residual is None else as_rows(residual),
            count,
        )
    return g.permute(0, 3, 1, 2), partial


def output_gradient(
    grad: Tensor,
    y: Tensor | None,
    gain: Tensor | None,
    curve: Tensor | None,
    level: Tensor | None,
    kernels: bool,
) -> Tensor:
    """Returns `gain grad + curve y + level` in the dtype of `grad`; absent terms are left out."""
    if not kernels or (gain is None and y is None):
        return add_statistics_gradient(grad, y, gain, curve, level)
    rows, out = as_rows(grad), empty_rows(grad)
    count, channels = pixels_of(rows), rows.shape[3]
    row = residual_rows.pointwise_gradient(
        channels, DTYPES[grad.dtype], gain=gain is not None, statistics=y is not None
    )
    with on_device(grad):
        row.launch(
            residual_rows.grid_of(count, channels),
            out,
            rows,
            None if y is None else as_rows(y),
            as_float32(gain),
            as_float32(curve),
            as_float32(level),
            count,
        )
    return out.permute(0, 3, 1, 2)


def statistics(y: Tensor, kernels: bool) -> Tensor:
    """Returns (count, sum, M2) of each channel in parts, `[parts, 3, C]` in the accumulation
    dtype."""
    if not kernels:
        return statistics_of(y)
    rows = as_rows(y)
    count, channels = pixels_of(rows), rows.shape[3]
    partial = empty_float32(y, residual_rows.parts_of(count), 3, channels)
    with on_device(y):
        residual_rows.column_statistics(channels, DTYPES[y.dtype]).launch(
            residual_rows.grid_of(count, channels), partial, rows, count
        )
    return partial
