"""Triton: the gradient of the grouped 3x3 convolution with respect to its weight, in two stages.

Letters and windows as in grouped_tiles.py. First every program sums its share of the pixels into
nine `BLOCK_K x BLOCK_K` matrices, one for each tap; then these partial sums are added in a fixed
order. Input and gradient pass through the same maps as in the other two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_conv_backward import load_gradient
from .grouped_tiles import (
    around_pair,
    load_channels,
    load_four_inputs,
    load_three_inputs,
    locate,
)
from .tile import dot, hash_in_order


@triton.jit
def add_products(a0, a1, a2, d, acc, PRECISION: tl.constexpr):
    """`acc[kx] + a[kx]^T d`: one row of the kernel, the lanes being summed over."""
    return (
        dot(tl.trans(a0), d, acc[0], PRECISION),
        dot(tl.trans(a1), d, acc[1], PRECISION),
        dot(tl.trans(a2), d, acc[2], PRECISION),
    )


@triton.jit
def add_pair_products(a, d, acc, PRECISION: tl.constexpr):
    """`add_products` for the two output columns of a lane."""
    acc = add_products(a[0], a[1], a[2], d[0], acc, PRECISION)
    return add_products(a[1], a[2], a[3], d[1], acc, PRECISION)


@triton.jit
def load_gradient_pair(
    ptrs, at, row, rows, valid, inside, terms, CHANNELS: tl.constexpr, FOLLOWED: tl.constexpr
):
    """`load_gradient` at the two columns of a lane."""
    return (
        load_gradient(ptrs, at, row, rows, valid[1], inside, terms, FOLLOWED),
        load_gradient(ptrs, at + CHANNELS, row, rows, valid[2], inside, terms, FOLLOWED),
    )


@triton.jit
def store_row(ptr, acc, BLOCK_K: tl.constexpr):
    """Three matrices, next to each other."""
    k = tl.arange(0, BLOCK_K)
    ptr += k[:, None] * BLOCK_K + k[None, :]
    tl.store(ptr, acc[0])
    tl.store(ptr + BLOCK_K * BLOCK_K, acc[1])
    tl.store(ptr + 2 * BLOCK_K * BLOCK_K, acc[2])


@triton.jit(do_not_specialize=["batch", "H", "W"])
def weight_gradient_stride1(
    partial_ptr,
    grad_ptr,
    y_ptr,
    through_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    batch,
    H,
    W,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums over the pixels; an input row meets the gradient rows above, at and below it.

    Grid: windows * splits. `partial [splits, windows, 9, BLOCK_K (in), BLOCK_K (out)]` float32; the
    rest as for `input_gradient_stride1`.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    FOLLOWED: tl.constexpr = y_ptr is not None
    WINDOWS: tl.constexpr = CHANNELS // WINDOW
    window = tl.program_id(0) % WINDOWS
    split = tl.program_id(0) // WINDOWS
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    ptrs = (grad_ptr, y_ptr)
    terms = (
        load_channels(through_ptr, channel, k < WINDOW, 1.0),
        load_channels(curve_ptr, channel, k < WINDOW, 0.0),
        load_channels(level_ptr, channel, k < WINDOW, 0.0),
    )
    affine = (
        load_channels(scale_ptr, channel, k < WINDOW, 0.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    step = W.to(tl.int64) * CHANNELS
    pairs = (W + 1) // 2
    zero = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    top = (zero, zero, zero)
    middle = (zero, zero, zero)
    bottom = (zero, zero, zero)
    parts = tl.cdiv(batch * pairs, BLOCK_M) * tl.cdiv(H, ROWS)
    for part in range(split, parts, tl.num_programs(0) // WINDOWS):
        sample, column, first, real = locate(part, batch, pairs, H, BLOCK_M, ROWS)
        column = column * 2
        valid = around_pair(column, W, real)
        at = ((sample * H + first) * W + column)[:, None] * CHANNELS + channel[None, :]
        above = load_gradient_pair(
            ptrs, at - step, first - 1, H, valid, inside, terms, CHANNELS, FOLLOWED
        )
        here = load_gradient_pair(ptrs, at, first, H, valid, inside, terms, CHANNELS, FOLLOWED)
        for i in range(tl.minimum(ROWS, H - first)):
            a = load_four_inputs(x_ptr + at, first + i, H, valid, inside, affine, CHANNELS, AFFINE)
            at += step
            below = load_gradient_pair(
                ptrs, at, first + i + 1, H, valid, inside, terms, CHANNELS, FOLLOWED
            )
            top = add_pair_products(a, below, top, PRECISION)
            middle = add_pair_products(a, here, middle, PRECISION)
            bottom = add_pair_products(a, above, bottom, PRECISION)
            above = here
            here = below
    out = partial_ptr + (split * WINDOWS + window).to(tl.int64) * (9 * BLOCK_K * BLOCK_K)
    store_row(out, top, BLOCK_K)
    store_row(out + 3 * BLOCK_K * BLOCK_K, middle, BLOCK_K)
    store_row(out + 6 * BLOCK_K * BLOCK_K, bottom, BLOCK_K)


@triton.jit(do_not_specialize=["batch", "H", "W"])
def weight_gradient_stride2(
    partial_ptr,
    grad_ptr,
    y_ptr,
    through_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    batch,
    H,
    W,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `weight_gradient_stride1` with stride 2: two input rows and one gradient row a step."""
    AFFINE: tl.constexpr = scale_ptr is not None
    FOLLOWED: tl.constexpr = y_ptr is not None
    WINDOWS: tl.constexpr = CHANNELS // WINDOW
    window = tl.program_id(0) % WINDOWS
    split = tl.program_id(0) // WINDOWS
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    ptrs = (grad_ptr, y_ptr)
    terms = (
        load_channels(through_ptr, channel, k < WINDOW, 1.0),
        load_channels(curve_ptr, channel, k < WINDOW, 0.0),
        load_channels(level_ptr, channel, k < WINDOW, 0.0),
    )
    affine = (
        load_channels(scale_ptr, channel, k < WINDOW, 0.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    OH = (H + 1) // 2
    OW = (W + 1) // 2
    out_step = OW.to(tl.int64) * CHANNELS
    step = W.to(tl.int64) * CHANNELS
    zero = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    top = (zero, zero, zero)
    middle = (zero, zero, zero)
    bottom = (zero, zero, zero)
    parts = tl.cdiv(batch * OW, BLOCK_M) * tl.cdiv(OH, ROWS)
    for part in range(split, parts, tl.num_programs(0) // WINDOWS):
        sample, column, first, real = locate(part, batch, OW, OH, BLOCK_M, ROWS)
        valid = around_pair(2 * column, W, real)
        at = ((sample * OH + first) * OW + column)[:, None] * CHANNELS + channel[None, :]
        x = x_ptr + ((sample * H + 2 * first) * W + 2 * column)[:, None] * CHANNELS
        x += channel[None, :]
        here = load_gradient(ptrs, at, first, OH, valid[1], inside, terms, FOLLOWED)
        for i in range(tl.minimum(ROWS, OH - first)):
            row = first + i
            a = load_three_inputs(x, 2 * row, H, valid, inside, affine, CHANNELS, AFFINE)
            middle = add_products(a[0], a[1], a[2], here, middle, PRECISION)
            a = load_three_inputs(x + step, 2 * row + 1, H, valid, inside, affine, CHANNELS, AFFINE)
            x += 2 * step
            at += out_step
            below = load_gradient(ptrs, at, row + 1, OH, valid[1], inside, terms, FOLLOWED)
            bottom = add_products(a[0], a[1], a[2], here, bottom, PRECISION)
            top = add_products(a[0], a[1], a[2], below, top, PRECISION)
            here = below
    out = partial_ptr + (split * WINDOWS + window).to(tl.int64) * (9 * BLOCK_K * BLOCK_K)
    store_row(out, top, BLOCK_K)
    store_row(out + 3 * BLOCK_K * BLOCK_K, middle, BLOCK_K)
    store_row(out + 6 * BLOCK_K * BLOCK_K, bottom, BLOCK_K)


hash_in_order(globals())
