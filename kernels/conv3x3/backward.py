"""Triton: the gradient of the grouped 3x3 convolution with respect to its input, with the backward
pass of the next BatchNorm on the way in and that of the affine map and ReLU on the way out.

Letters and windows as in kernels/conv3x3/tiles.py. The walk is along the rows of the output's
gradient; the weights come with input and output channels exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import dot, hash_in_order, round_to

from .tiles import add_six, around_pair, at_row, load_channels, load_taps, locate


@triton.jit
def load_pair(ptrs, row, rows, valid, inside, WITH_Y: tl.constexpr):
    """`grad` and `y` at one pixel a lane, 0 outside the map."""
    valid = at_row(valid, row, rows)
    grad = tl.load(ptrs[0], mask=valid & inside, other=0.0)
    y = grad
    if WITH_Y:
        y = tl.load(ptrs[1], mask=valid & inside, other=0.0)
    return grad, y


@triton.jit
def follow_pair(pair, row, rows, valid, terms, WITH_Y: tl.constexpr):
    """`grad + curve y + level` of what `load_pair` gave, 0 outside the map: the gradient of the
    convolution's output. Without WITH_Y it is `grad` itself."""
    grad = pair[0]
    if WITH_Y:
        # The others are 0 outside the map; only the constant has to be taken away there.
        level = tl.where(at_row(valid, row, rows), terms[1], 0.0)
        rest = pair[1].to(tl.float32) * terms[0] + level
        grad = round_to(grad.to(tl.float32) + rest, grad.dtype)
    return grad


@triton.jit
def load_gradient(ptrs, row, rows, valid, inside, terms, WITH_Y: tl.constexpr):
    """The gradient of the convolution's output at one pixel a lane."""
    pair = load_pair(ptrs, row, rows, valid, inside, WITH_Y)
    return follow_pair(pair, row, rows, valid, terms, WITH_Y)


@triton.jit
def shift(ptrs, by):
    """Two pointers, moved by as many elements."""
    return ptrs[0] + by, ptrs[1] + by


@triton.jit
def load_four_gradients(
    ptrs, row, rows, valid, inside, terms, CHANNELS: tl.constexpr, WITH_Y: tl.constexpr
):
    """`load_gradient` at four adjacent columns; `ptrs` point to the second."""
    return (
        load_gradient(shift(ptrs, -CHANNELS), row, rows, valid[0], inside, terms, WITH_Y),
        load_gradient(ptrs, row, rows, valid[1], inside, terms, WITH_Y),
        load_gradient(shift(ptrs, CHANNELS), row, rows, valid[2], inside, terms, WITH_Y),
        load_gradient(shift(ptrs, 2 * CHANNELS), row, rows, valid[3], inside, terms, WITH_Y),
    )


@triton.jit
def store_gradient(ptrs, acc, valid, inside, affine, sums, AFFINE: tl.constexpr):
    """Store the input's gradient of one pixel a lane, and add to the sums for bias and scale;
    `ptrs` point to the gradient and to the input."""
    if AFFINE:
        x = tl.load(ptrs[1], mask=valid & inside, other=0.0).to(tl.float32)
        acc = tl.where((x * affine[0] + affine[1] > 0) & valid, acc, 0.0)
        sums = (sums[0] + acc, sums[1] + acc * x)
        acc *= affine[0]
    tl.store(ptrs[0], round_to(acc, ptrs[0].dtype.element_ty), mask=valid & inside)
    return sums


@triton.jit
def store_sums(ptr, part, channel, inside, sums, CHANNELS: tl.constexpr):
    """The gradients of bias and scale from one program."""
    out = ptr + part.to(tl.int64) * (2 * CHANNELS) + channel
    tl.store(out, tl.sum(sums[0], 0), mask=inside)
    tl.store(out + CHANNELS, tl.sum(sums[1], 0), mask=inside)


@triton.jit(do_not_specialize=["batch", "H", "W", "part_rows"])
def input_gradient_stride1(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    y_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    batch,
    H,
    W,
    part_rows,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The forward walk along the gradient, with weights that are transposed and mirrored.

    Grid as for `forward_stride1`. `dx`, `grad`, `y`, `x [B, H, W, CHANNELS]`; `y` and `curve`,
    `level [CHANNELS]` float32 or None; `x`, `scale`, `bias [CHANNELS]` float32 or None, and
    with them `partial [parts, 2, CHANNELS]` float32, the gradients of bias and scale.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    WITH_Y: tl.constexpr = y_ptr is not None
    window = tl.program_id(0) % (CHANNELS // WINDOW)
    part = tl.program_id(0) // (CHANNELS // WINDOW)
    sample, column, first, real = locate(part, batch, (W + 1) // 2, H, part_rows, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    terms = (
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
    at = ((sample * H + first) * W + column)[:, None] * CHANNELS + channel[None, :]
    ptrs = (grad_ptr + at - step, (y_ptr if WITH_Y else grad_ptr) + at - step)
    out = (dx_ptr + at, (x_ptr if AFFINE else dx_ptr) + at)
    zero = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)

    d = load_four_gradients(ptrs, first - 1, H, valid, inside, terms, CHANNELS, WITH_Y)
    acc = add_six(d, top, (zero, zero), PRECISION)
    ptrs = shift(ptrs, step)
    d = load_four_gradients(ptrs, first, H, valid, inside, terms, CHANNELS, WITH_Y)
    acc = add_six(d, middle, acc, PRECISION)
    below = add_six(d, top, (zero, zero), PRECISION)
    sums = (zero, zero)
    for i in range(tl.minimum(part_rows, H - first)):
        ptrs = shift(ptrs, step)
        d = load_four_gradients(ptrs, first + 1 + i, H, valid, inside, terms, CHANNELS, WITH_Y)
        acc = add_six(d, bottom, acc, PRECISION)
        sums = store_gradient(out, acc[0], valid[1], inside, affine, sums, AFFINE)
        sums = store_gradient(shift(out, CHANNELS), acc[1], valid[2], inside, affine, sums, AFFINE)
        out = shift(out, step)
        acc = add_six(d, middle, below, PRECISION)
        below = add_six(d, top, (zero, zero), PRECISION)
    if AFFINE:
        store_sums(partial_ptr, part, channel, k < WINDOW, sums, CHANNELS)


@triton.jit(do_not_specialize=["batch", "H", "W", "part_rows"])
def input_gradient_stride2(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    y_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    batch,
    H,
    W,
    part_rows,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `input_gradient_stride1` with stride 2; weights transposed, not mirrored.

    A lane is one column of the output; the four input pixels at (2 row, 2 column) and to the right
    and below take 1, 2, 2 and 4 of the nine taps, from this gradient row and the next. Grid as for
    `forward_stride2`; `grad`, `y [B, OH, OW, CHANNELS]`.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    WITH_Y: tl.constexpr = y_ptr is not None
    OH = (H + 1) // 2
    OW = (W + 1) // 2
    window = tl.program_id(0) % (CHANNELS // WINDOW)
    part = tl.program_id(0) // (CHANNELS // WINDOW)
    sample, column, first, real = locate(part, batch, OW, OH, part_rows, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    terms = (
        load_channels(curve_ptr, channel, k < WINDOW, 0.0),
        load_channels(level_ptr, channel, k < WINDOW, 0.0),
    )
    affine = (
        load_channels(scale_ptr, channel, k < WINDOW, 1.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    top, middle, bottom = load_taps(weight_ptr, window, BLOCK_K)
    here = real[:, None]
    after = (real & (column + 1 < OW))[:, None]
    right = (real & (2 * column + 1 < W))[:, None]
    out_step = OW.to(tl.int64) * CHANNELS
    step = W.to(tl.int64) * CHANNELS
    at = ((sample * OH + first) * OW + column)[:, None] * CHANNELS + channel[None, :]
    ptrs = (grad_ptr + at, (y_ptr if WITH_Y else grad_ptr) + at)
    at = ((sample * H + 2 * first) * W + 2 * column)[:, None] * CHANNELS + channel[None, :]
    out = (dx_ptr + at, (x_ptr if AFFINE else dx_ptr) + at)
    zero = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)

    d = load_gradient(ptrs, first, OH, here, inside, terms, WITH_Y)
    e = load_gradient(shift(ptrs, CHANNELS), first, OH, after, inside, terms, WITH_Y)
    sums = (zero, zero)
    for i in range(tl.minimum(part_rows, OH - first)):
        row = first + i
        ptrs = shift(ptrs, out_step)
        acc = dot(d, middle[1], zero, PRECISION)
        sums = store_gradient(out, acc, here, inside, affine, sums, AFFINE)
        acc = dot(e, middle[0], dot(d, middle[2], zero, PRECISION), PRECISION)
        sums = store_gradient(shift(out, CHANNELS), acc, right, inside, affine, sums, AFFINE)
        acc = dot(d, bottom[1], zero, PRECISION)
        corner = dot(e, bottom[0], dot(d, bottom[2], zero, PRECISION), PRECISION)
        d = load_gradient(ptrs, row + 1, OH, here, inside, terms, WITH_Y)
        e = load_gradient(shift(ptrs, CHANNELS), row + 1, OH, after, inside, terms, WITH_Y)
        acc = dot(d, top[1], acc, PRECISION)
        corner = dot(e, top[0], dot(d, top[2], corner, PRECISION), PRECISION)
        row = 2 * row + 1
        out = shift(out, step)
        sums = store_gradient(out, acc, at_row(here, row, H), inside, affine, sums, AFFINE)
        sums = store_gradient(
            shift(out, CHANNELS), corner, at_row(right, row, H), inside, affine, sums, AFFINE
        )
        out = shift(out, step)
    if AFFINE:
        store_sums(partial_ptr, part, channel, k < WINDOW, sums, CHANNELS)


hash_in_order(globals())
