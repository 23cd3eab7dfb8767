"""Triton: the gradient of the grouped 3x3 convolution with respect to its input, with the backward
pass of the next BatchNorm on the way in and that of the affine map and ReLU on the way out.

Letters and windows as in grouped_tiles.py. The walk is along the rows of the output's gradient; the
weights come with input and output channels exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_tiles import add_six, around_pair, load_channels, load_taps, locate
from .tile import dot, hash_in_order, round_to


@triton.jit
def load_gradient(ptrs, at, row, rows, valid, inside, terms, FOLLOWED: tl.constexpr):
    """`through grad + curve y + level` at one pixel a lane, 0 outside the map: the gradient of the
    convolution's output. Without FOLLOWED it is `grad` itself."""
    valid = valid & (row >= 0) & (row < rows)
    grad = tl.load(ptrs[0] + at, mask=valid & inside, other=0.0)
    if not FOLLOWED:
        return grad
    y = tl.load(ptrs[1] + at, mask=valid & inside, other=0.0)
    # The others are 0 outside the map; only the constant has to be taken away there.
    rest = y.to(tl.float32) * terms[1] + tl.where(valid, terms[2], 0.0)
    return round_to(grad.to(tl.float32) * terms[0] + rest, grad.dtype)


@triton.jit
def load_four_gradients(
    ptrs, at, row, rows, valid, inside, terms, CHANNELS: tl.constexpr, FOLLOWED: tl.constexpr
):
    """`load_gradient` at four adjacent columns; `at` is the offset of the second."""
    return (
        load_gradient(ptrs, at - CHANNELS, row, rows, valid[0], inside, terms, FOLLOWED),
        load_gradient(ptrs, at, row, rows, valid[1], inside, terms, FOLLOWED),
        load_gradient(ptrs, at + CHANNELS, row, rows, valid[2], inside, terms, FOLLOWED),
        load_gradient(ptrs, at + 2 * CHANNELS, row, rows, valid[3], inside, terms, FOLLOWED),
    )


@triton.jit
def store_gradient(dx_ptr, x_ptr, at, acc, valid, inside, affine, sums, AFFINE: tl.constexpr):
    """Store the input's gradient of one pixel a lane; add to the sums for scale and bias."""
    if AFFINE:
        x = tl.load(x_ptr + at, mask=valid & inside, other=0.0).to(tl.float32)
        acc = tl.where((x * affine[0] + affine[1] > 0) & valid, acc, 0.0)
        sums = (sums[0] + acc * x, sums[1] + acc)
        acc *= affine[0]
    tl.store(dx_ptr + at, round_to(acc, dx_ptr.dtype.element_ty), mask=valid & inside)
    return sums


@triton.jit
def store_sums(ptr, part, channel, inside, sums, CHANNELS: tl.constexpr):
    """The gradients of scale and bias from one program."""
    out = ptr + part.to(tl.int64) * (2 * CHANNELS) + channel
    tl.store(out, tl.sum(sums[0], 0), mask=inside)
    tl.store(out + CHANNELS, tl.sum(sums[1], 0), mask=inside)


@triton.jit(do_not_specialize=["batch", "H", "W"])
def input_gradient_stride1(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    y_ptr,
    through_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
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
    """The forward walk along the gradient, with weights that are transposed and mirrored.

    Grid as for `forward_stride1`. `dx`, `grad`, `y`, `x [B, H, W, CHANNELS]`; `y` and `through`,
    `curve`, `level [CHANNELS]` float32 or None; `x`, `scale`, `bias [CHANNELS]` float32 or None, and
    with them `partial [parts, 2, CHANNELS]` float32, the gradients of scale and bias.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    FOLLOWED: tl.constexpr = y_ptr is not None
    window = tl.program_id(0) % (CHANNELS // WINDOW)
    part = tl.program_id(0) // (CHANNELS // WINDOW)
    sample, column, first, real = locate(part, batch, (W + 1) // 2, H, BLOCK_M, ROWS)
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
        load_channels(scale_ptr, channel, k < WINDOW, 1.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    top, middle, bottom = load_taps(weight_ptr, window, BLOCK_K)
    column = column * 2
    valid = around_pair(column, W, real)
    step = W.to(tl.int64) * CHANNELS
    out = ((sample * H + first) * W + column)[:, None] * CHANNELS + channel[None, :]
    at = out - step
    zero = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)

    d = load_four_gradients(ptrs, at, first - 1, H, valid, inside, terms, CHANNELS, FOLLOWED)
    acc = add_six(d, top, (zero, zero), PRECISION)
    at += step
    d = load_four_gradients(ptrs, at, first, H, valid, inside, terms, CHANNELS, FOLLOWED)
    acc = add_six(d, middle, acc, PRECISION)
    below = add_six(d, top, (zero, zero), PRECISION)
    sums = (zero, zero)
    for i in range(tl.minimum(ROWS, H - first)):
        at += step
        d = load_four_gradients(
            ptrs, at, first + 1 + i, H, valid, inside, terms, CHANNELS, FOLLOWED
        )
        acc = add_six(d, bottom, acc, PRECISION)
        sums = store_gradient(dx_ptr, x_ptr, out, acc[0], valid[1], inside, affine, sums, AFFINE)
        sums = store_gradient(
            dx_ptr, x_ptr, out + CHANNELS, acc[1], valid[2], inside, affine, sums, AFFINE
        )
        out += step
        acc = add_six(d, middle, below, PRECISION)
        below = add_six(d, top, (zero, zero), PRECISION)
    if AFFINE:
        store_sums(partial_ptr, part, channel, k < WINDOW, sums, CHANNELS)


@triton.jit(do_not_specialize=["batch", "H", "W"])
def input_gradient_stride2(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    y_ptr,
    through_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
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
    """As `input_gradient_stride1` with stride 2; weights transposed, not mirrored.

    A lane is one column of the output; the four input pixels at (2 row, 2 column) and to the right
    and below take 1, 2, 2 and 4 of the nine taps, from this gradient row and the next. Grid:
    windows * ceil(OH / ROWS) * ceil(B OW / BLOCK_M); `grad`, `y [B, OH, OW, CHANNELS]`.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    FOLLOWED: tl.constexpr = y_ptr is not None
    OH = (H + 1) // 2
    OW = (W + 1) // 2
    window = tl.program_id(0) % (CHANNELS // WINDOW)
    part = tl.program_id(0) // (CHANNELS // WINDOW)
    sample, column, first, real = locate(part, batch, OW, OH, BLOCK_M, ROWS)
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
        load_channels(scale_ptr, channel, k < WINDOW, 1.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    top, middle, bottom = load_taps(weight_ptr, window, BLOCK_K)
    here = real[:, None]
    next_column = (real & (column + 1 < OW))[:, None]
    right = (real & (2 * column + 1 < W))[:, None]
    out_step = OW.to(tl.int64) * CHANNELS
    step = W.to(tl.int64) * CHANNELS
    at = ((sample * OH + first) * OW + column)[:, None] * CHANNELS + channel[None, :]
    out = ((sample * H + 2 * first) * W + 2 * column)[:, None] * CHANNELS + channel[None, :]
    zero = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)

    d = load_gradient(ptrs, at, first, OH, here, inside, terms, FOLLOWED)
    e = load_gradient(ptrs, at + CHANNELS, first, OH, next_column, inside, terms, FOLLOWED)
    sums = (zero, zero)
    for i in range(tl.minimum(ROWS, OH - first)):
        row = first + i
        at += out_step
        acc = dot(d, middle[1], zero, PRECISION)
        sums = store_gradient(dx_ptr, x_ptr, out, acc, here, inside, affine, sums, AFFINE)
        acc = dot(e, middle[0], dot(d, middle[2], zero, PRECISION), PRECISION)
        sums = store_gradient(
            dx_ptr, x_ptr, out + CHANNELS, acc, right, inside, affine, sums, AFFINE
        )
        acc = dot(d, bottom[1], zero, PRECISION)
        corner = dot(e, bottom[0], dot(d, bottom[2], zero, PRECISION), PRECISION)
        d = load_gradient(ptrs, at, row + 1, OH, here, inside, terms, FOLLOWED)
        e = load_gradient(ptrs, at + CHANNELS, row + 1, OH, next_column, inside, terms, FOLLOWED)
        acc = dot(d, top[1], acc, PRECISION)
        corner = dot(e, top[0], dot(d, top[2], corner, PRECISION), PRECISION)
        lower = 2 * row + 1 < H
        sums = store_gradient(
            dx_ptr, x_ptr, out + step, acc, here & lower, inside, affine, sums, AFFINE
        )
        sums = store_gradient(
            dx_ptr,
            x_ptr,
            out + step + CHANNELS,
            corner,
            right & lower,
            inside,
            affine,
            sums,
            AFFINE,
        )
        out += 2 * step
    if AFFINE:
        store_sums(partial_ptr, part, channel, k < WINDOW, sums, CHANNELS)


hash_in_order(globals())
