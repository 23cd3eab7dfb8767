"""Triton: the end of a residual block, `x = relu(scale y + bias + residual)`, element by element,
and the statistics of what a plain matrix product leaves behind.

Maps are matrices of rows of channels, `[ROWS, CHANNELS]`: channels-last. A program takes BLOCK_C
channels of TRIPS * BLOCK_P rows. They serve the 1x1 convolutions that a library computes; kernels
that multiply do all of this on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.conv3x3.tiles import load_channels
from coded_resnext.kernels.tile import hash_in_order, rectify, round_to


@triton.jit
def locate_tile(
    rows, CHANNELS: tl.constexpr, TRIPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The part of the rows that a program takes, its first row, and its channels."""
    COLUMNS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // COLUMNS
    channel = (tl.program_id(0) % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * (TRIPS * BLOCK_P)
    return part, first, channel


@triton.jit
def tile_offsets(
    row, rows, channel, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Offsets of a tile that begins at a row, and which of its elements exist."""
    p = row + tl.arange(0, BLOCK_P)
    exists = p < rows
    if CHANNELS % BLOCK_C == 0:
        inside = exists[:, None]
    else:
        inside = exists[:, None] & (channel < CHANNELS)[None, :]
    return p.to(tl.int64)[:, None] * CHANNELS + channel[None, :], inside


@triton.jit(do_not_specialize=["rows", "pixels"])
def pointwise_join(
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_bias_ptr,
    factor_ptr,
    rows,
    pixels,
    CHANNELS: tl.constexpr,
    TRIPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`x = relu(factor scale y + bias + residual)`; a residual may have a map of its own.

    Grid: parts * column blocks. `x`, `y`, `residual [ROWS, CHANNELS]` in one dtype; the maps
    `[CHANNELS]` float32, of which `scale` and those of the residual may be None. `factor
    [ROWS / pixels]`, one number a sample, float32 or None.
    """
    _part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    real = channel < CHANNELS
    scale = load_channels(scale_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr, channel, real, 0.0)
    residual_scale = load_channels(residual_scale_ptr, channel, real, 1.0)
    residual_bias = load_channels(residual_bias_ptr, channel, real, 0.0)
    for trip in range(TRIPS):
        at, inside = tile_offsets(first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C)
        value = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
        if factor_ptr is not None:
            row = first + trip * BLOCK_P + tl.arange(0, BLOCK_P)
            factor = tl.load(factor_ptr + row // pixels, mask=row < rows, other=0.0)
            value *= factor[:, None]
        value += bias
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if residual_scale_ptr is not None:
            residual = residual * residual_scale + residual_bias
        x = round_to(rectify(value + residual), x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, x, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def pointwise_join_backward(
    g_ptr,
    partial_ptr,
    grad_ptr,
    x_ptr,
    y_ptr,
    residual_ptr,
    rows,
    CHANNELS: tl.constexpr,
    TRIPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`g = grad` where `x > 0`, and each part's sums of `g`, `g y` and `g residual`.

    Grid: parts * column blocks. `partial [parts, 1 to 3, CHANNELS]` float32. `y` is None where it
    was not written, `residual` where it has no map; their sums are then left out.
    """
    RAW: tl.constexpr = y_ptr is not None
    MAPPED: tl.constexpr = residual_ptr is not None
    SUMS: tl.constexpr = 1 + RAW + MAPPED
    part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    of_g = zero
    of_y = zero
    of_residual = zero
    for trip in range(TRIPS):
        at, inside = tile_offsets(first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(x > 0, grad, 0.0)
        tl.store(g_ptr + at, round_to(g, g_ptr.dtype.element_ty), mask=inside)
        of_g += g
        if RAW:
            of_y += g * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MAPPED:
            of_residual += g * tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = partial_ptr + part.to(tl.int64) * (SUMS * CHANNELS) + channel
    real = channel < CHANNELS
    tl.store(out, tl.sum(of_g, 0), mask=real)
    if RAW:
        tl.store(out + CHANNELS, tl.sum(of_y, 0), mask=real)
    if MAPPED:
        tl.store(out + (SUMS - 1) * CHANNELS, tl.sum(of_residual, 0), mask=real)


@triton.jit(do_not_specialize=["rows"])
def pointwise_gradient(
    out_ptr,
    grad_ptr,
    y_ptr,
    gain_ptr,
    curve_ptr,
    level_ptr,
    rows,
    CHANNELS: tl.constexpr,
    TRIPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`gain grad + curve y + level`, the gradient of a convolution's output.

    Grid: parts * column blocks. `out`, `grad`, `y [ROWS, CHANNELS]` in one dtype; the vectors
    `[CHANNELS]` float32. `gain` may be None, and `y`, `curve` and `level` together.
    """
    _part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    real = channel < CHANNELS
    gain = load_channels(gain_ptr, channel, real, 1.0)
    curve = load_channels(curve_ptr, channel, real, 0.0)
    level = load_channels(level_ptr, channel, real, 0.0)
    for trip in range(TRIPS):
        at, inside = tile_offsets(first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C)
        value = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * gain
        if y_ptr is not None:
            value += curve * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) + level
        tl.store(out_ptr + at, round_to(value, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def column_statistics(
    partial_ptr,
    y_ptr,
    rows,
    CHANNELS: tl.constexpr,
    TRIPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each part's (count, sum, M2) of `y [ROWS, CHANNELS]`, `partial [parts, 3, CHANNELS]` float32.

    Grid: parts * column blocks. kernels/batch_norm/kernel.py adds them up. Deviations from the
    part's first row are what is summed: of a mean that is large beside the spread, sums of
    squares would leave nothing.
    """
    part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    real = channel < CHANNELS
    near = tl.load(y_ptr + first.to(tl.int64) * CHANNELS + channel, mask=real, other=0.0)
    near = near.to(tl.float32)
    totals = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for trip in range(TRIPS):
        at, inside = tile_offsets(first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, y - near[None, :], 0.0)
        totals += deviation
        squares += deviation * deviation
    count = tl.minimum(rows - first, TRIPS * BLOCK_P).to(tl.float32)
    total = tl.sum(totals, 0)
    m2 = rectify(tl.sum(squares, 0) - total * (total / count))
    out = partial_ptr + part.to(tl.int64) * (3 * CHANNELS) + channel
    tl.store(out, tl.broadcast_to(count, total.shape), mask=real)
    tl.store(out + CHANNELS, total + count * near, mask=real)
    tl.store(out + 2 * CHANNELS, m2, mask=real)


hash_in_order(globals())
