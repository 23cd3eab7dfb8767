"""Triton: the end of a residual block, `x = relu(scale y + bias + residual)`, element by element,
and the statistics of what a plain matrix product leaves behind.

Maps are matrices of rows of channels, `[ROWS, CHANNELS]`: channels-last. A program takes BLOCK_C
channels of TRIPS * BLOCK_P rows. They serve the 1x1 convolutions that a library computes; kernels
that multiply do all of this on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_conv import merge_lanes
from .grouped_tiles import load_channels
from .tile import hash_in_order, rectify, round_to


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
    """Offsets of a tile that begins at a row, which of its rows exist, and which elements do."""
    p = row + tl.arange(0, BLOCK_P)
    exists = p < rows
    if CHANNELS % BLOCK_C == 0:
        inside = exists[:, None]
    else:
        inside = exists[:, None] & (channel < CHANNELS)[None, :]
    return p.to(tl.int64)[:, None] * CHANNELS + channel[None, :], exists, inside


@triton.jit(do_not_specialize=["rows"])
def pointwise_join(
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_bias_ptr,
    rows,
    CHANNELS: tl.constexpr,
    TRIPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`x = relu(scale y + bias + residual)`; a residual may have a map of its own.

    Grid: parts * column blocks. `x`, `y`, `residual [ROWS, CHANNELS]` in one dtype; the maps
    `[CHANNELS]` float32, those of the residual may be None.
    """
    _part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    real = channel < CHANNELS
    scale = load_channels(scale_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr, channel, real, 0.0)
    residual_scale = load_channels(residual_scale_ptr, channel, real, 1.0)
    residual_bias = load_channels(residual_bias_ptr, channel, real, 0.0)
    for trip in range(TRIPS):
        at, _exists, inside = tile_offsets(
            first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C
        )
        value = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale + bias
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

    Grid: parts * column blocks. `partial [parts, 2 or 3, CHANNELS]` float32; the third sum is there
    with a `residual`, which is None for one without a map.
    """
    MAPPED: tl.constexpr = residual_ptr is not None
    SUMS: tl.constexpr = 3 if MAPPED else 2
    part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    of_g = zero
    of_y = zero
    of_residual = zero
    for trip in range(TRIPS):
        at, _exists, inside = tile_offsets(
            first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C
        )
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(x > 0, grad, 0.0)
        tl.store(g_ptr + at, round_to(g, g_ptr.dtype.element_ty), mask=inside)
        of_g += g
        of_y += g * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MAPPED:
            of_residual += g * tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = partial_ptr + part.to(tl.int64) * (SUMS * CHANNELS) + channel
    real = channel < CHANNELS
    tl.store(out, tl.sum(of_g, 0), mask=real)
    tl.store(out + CHANNELS, tl.sum(of_y, 0), mask=real)
    if MAPPED:
        tl.store(out + 2 * CHANNELS, tl.sum(of_residual, 0), mask=real)


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

    Grid: parts * column blocks. What `merge_statistics` of batch_norm.py makes one of.
    """
    part, first, channel = locate_tile(rows, CHANNELS, TRIPS, BLOCK_P, BLOCK_C)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = zero
    squares = zero
    count = tl.zeros((BLOCK_P, 1), tl.float32)
    for trip in range(TRIPS):
        at, exists, inside = tile_offsets(
            first + trip * BLOCK_P, rows, channel, CHANNELS, BLOCK_P, BLOCK_C
        )
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += y
        squares += y * y
        count += tl.where(exists, 1.0, 0.0)[:, None]
    merge_lanes(
        partial_ptr,
        part,
        channel,
        channel < CHANNELS,
        (total, squares),
        count,
        (zero, zero),
        0.0 * count,
        CHANNELS,
    )


hash_in_order(globals())
