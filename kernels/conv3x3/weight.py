"""Triton: the gradient of the grouped 3x3 convolution with respect to its weight, in two stages.

Letters and windows as in kernels/conv3x3/tiles.py. First every program sums its share of the pixels
into nine `BLOCK_K x BLOCK_K` matrices, one for each tap; then these partial sums are added in a
fixed order. Input and gradient pass through the same maps as in the other two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import dot, hash_in_order, round_to

from .backward import follow_pair, load_gradient, load_pair, shift
from .tiles import (
    activate_three,
    around_pair,
    load_channels,
    load_three,
    load_three_inputs,
    locate,
)


@triton.jit
def add_products(a, d, acc, PRECISION: tl.constexpr):
    """`acc[kx] + a[kx]^T d`: one row of the kernel, the lanes being summed over."""
    return (
        dot(tl.trans(a[0]), d, acc[0], PRECISION),
        dot(tl.trans(a[1]), d, acc[1], PRECISION),
        dot(tl.trans(a[2]), d, acc[2], PRECISION),
    )


@triton.jit
def store_row(ptr, acc, BLOCK_K: tl.constexpr):
    """Three matrices, next to each other."""
    k = tl.arange(0, BLOCK_K)
    ptr += k[:, None] * BLOCK_K + k[None, :]
    tl.store(ptr, acc[0])
    tl.store(ptr + BLOCK_K * BLOCK_K, acc[1])
    tl.store(ptr + 2 * BLOCK_K * BLOCK_K, acc[2])


@triton.jit(do_not_specialize=["batch", "H", "W", "part_rows"])
def weight_gradient_stride1(
    partial_ptr,
    grad_ptr,
    y_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    batch,
    H,
    W,
    part_rows,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums over the pixels; an input row meets the gradient rows above, at and below it.

    Grid: windows * splits. `partial [splits, windows, 9, BLOCK_K (in), BLOCK_K (out)]` float32; the
    rest as for `input_gradient_stride1`. AHEAD asks for what the next row needs before this one is
    multiplied, for more registers.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    WITH_Y: tl.constexpr = y_ptr is not None
    WINDOWS: tl.constexpr = CHANNELS // WINDOW
    window = tl.program_id(0) % WINDOWS
    split = tl.program_id(0) // WINDOWS
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    terms = (
        load_channels(curve_ptr, channel, k < WINDOW, 0.0),
        load_channels(level_ptr, channel, k < WINDOW, 0.0),
    )
    affine = (
        load_channels(scale_ptr, channel, k < WINDOW, 0.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    step = W.to(tl.int64) * CHANNELS
    zero = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    top = (zero, zero, zero)
    middle = (zero, zero, zero)
    bottom = (zero, zero, zero)
    parts = tl.cdiv(batch * W, BLOCK_M) * tl.cdiv(H, part_rows)
    for part in range(split, parts, tl.num_programs(0) // WINDOWS):
        sample, column, first, real = locate(part, batch, W, H, part_rows, BLOCK_M)
        valid = around_pair(column, W, real)
        at = ((sample * H + first) * W + column)[:, None] * CHANNELS + channel[None, :]
        ptrs = (grad_ptr + at - step, (y_ptr if WITH_Y else grad_ptr) + at - step)
        x = x_ptr + at
        above = load_gradient(ptrs, first - 1, H, valid[1], inside, terms, WITH_Y)
        ptrs = shift(ptrs, step)
        here = load_gradient(ptrs, first, H, valid[1], inside, terms, WITH_Y)
        ptrs = shift(ptrs, step)
        last = tl.minimum(first + part_rows, H)
        if AHEAD:
            next_x = load_three(x, first, last, valid, inside, CHANNELS)
            next_pair = load_pair(ptrs, first + 1, H, valid[1], inside, WITH_Y)
        for i in range(last - first):
            row = first + i
            if not AHEAD:
                next_x = load_three(x, row, last, valid, inside, CHANNELS)
            a = activate_three(next_x, row, last, valid, affine, AFFINE)
            x += step
            if AHEAD:
                below = follow_pair(next_pair, row + 1, H, valid[1], terms, WITH_Y)
                ptrs = shift(ptrs, step)
                next_x = load_three(x, row + 1, last, valid, inside, CHANNELS)
                next_pair = load_pair(ptrs, row + 2, H, valid[1], inside, WITH_Y)
            bottom = add_products(a, above, bottom, PRECISION)
            middle = add_products(a, here, middle, PRECISION)
            if not AHEAD:
                below = load_gradient(ptrs, row + 1, H, valid[1], inside, terms, WITH_Y)
                ptrs = shift(ptrs, step)
            top = add_products(a, below, top, PRECISION)
            above = here
            here = below
    out = partial_ptr + (split * WINDOWS + window).to(tl.int64) * (9 * BLOCK_K * BLOCK_K)
    store_row(out, top, BLOCK_K)
    store_row(out + 3 * BLOCK_K * BLOCK_K, middle, BLOCK_K)
    store_row(out + 6 * BLOCK_K * BLOCK_K, bottom, BLOCK_K)


@triton.jit(do_not_specialize=["batch", "H", "W", "part_rows"])
def weight_gradient_stride2(
    partial_ptr,
    grad_ptr,
    y_ptr,
    curve_ptr,
    level_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
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
    """As `weight_gradient_stride1` with stride 2: two input rows and one gradient row a step."""
    AFFINE: tl.constexpr = scale_ptr is not None
    WITH_Y: tl.constexpr = y_ptr is not None
    WINDOWS: tl.constexpr = CHANNELS // WINDOW
    window = tl.program_id(0) % WINDOWS
    split = tl.program_id(0) // WINDOWS
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    terms = (
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
    parts = tl.cdiv(batch * OW, BLOCK_M) * tl.cdiv(OH, part_rows)
    for part in range(split, parts, tl.num_programs(0) // WINDOWS):
        sample, column, first, real = locate(part, batch, OW, OH, part_rows, BLOCK_M)
        valid = around_pair(2 * column, W, real)
        at = ((sample * OH + first) * OW + column)[:, None] * CHANNELS + channel[None, :]
        ptrs = (grad_ptr + at, (y_ptr if WITH_Y else grad_ptr) + at)
        at = ((sample * H + 2 * first) * W + 2 * column)[:, None] * CHANNELS + channel[None, :]
        x = x_ptr + at
        d = load_gradient(ptrs, first, OH, valid[1], inside, terms, WITH_Y)
        for i in range(tl.minimum(part_rows, OH - first)):
            row = first + i
            a = load_three_inputs(x, 2 * row, H, valid, inside, affine, CHANNELS, AFFINE)
            middle = add_products(a, d, middle, PRECISION)
            x += step
            a = load_three_inputs(x, 2 * row + 1, H, valid, inside, affine, CHANNELS, AFFINE)
            bottom = add_products(a, d, bottom, PRECISION)
            x += step
            ptrs = shift(ptrs, out_step)
            d = load_gradient(ptrs, row + 1, OH, valid[1], inside, terms, WITH_Y)
            top = add_products(a, d, top, PRECISION)
    out = partial_ptr + (split * WINDOWS + window).to(tl.int64) * (9 * BLOCK_K * BLOCK_K)
    store_row(out, top, BLOCK_K)
    store_row(out + 3 * BLOCK_K * BLOCK_K, middle, BLOCK_K)
    store_row(out + 6 * BLOCK_K * BLOCK_K, bottom, BLOCK_K)


hash_in_order(globals())


@triton.jit
def weight_index(
    window,
    tap,
    source,
    target,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    LAST: tl.constexpr,
):
    """Where `[N*D, D, 3, 3]` keeps the weight from channel `source` to channel `target` of a
    window, and whether there is such a weight. With LAST it is channels-last."""
    group = source // PADDED
    real = (group == target // PADDED) & (group < GROUP) & (window * GROUP + group < GROUPS)
    real = real & (source % PADDED < WIDTH) & (target % PADDED < WIDTH)
    row = (window * GROUP + group) * WIDTH + target % PADDED
    column = source % PADDED
    at = (row * 9 + tap) * WIDTH + column if LAST else (row * WIDTH + column) * 9 + tap
    return at, real


@triton.jit
def round_block(to_ptr, from_ptr, block, size, BLOCK: tl.constexpr):
    """Rounds a block of `size` elements, if it is one of theirs; its number behind these."""
    if to_ptr is not None:
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = (at >= 0) & (at < size)
        value = tl.load(from_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(to_ptr + at, round_to(value, to_ptr.dtype.element_ty), mask=mask)
    return block - tl.cdiv(size, BLOCK)


@triton.jit(do_not_specialize=["first_size", "second_size", "third_size"])
def pack_weights(
    packed_ptr,
    first_to_ptr,
    second_to_ptr,
    third_to_ptr,
    weight_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    first_size,
    second_size,
    third_size,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST: tl.constexpr,
    MIRROR: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """`weight [N*D, D, 3, 3]` to `packed [2, windows, 9, BLOCK_K, BLOCK_K]` in a dtype of its own.

    First from row to column, as the forward pass reads it; then from column to row, as the gradient
    of the input does, with MIRROR its taps reversed. Besides, up to three other weights of so many
    elements are rounded to that dtype. Grid: windows * 9, and the others' blocks of BLOCK_E.
    """
    matrices: tl.constexpr = (GROUPS + GROUP - 1) // GROUP * 9
    if tl.program_id(0) >= matrices:
        block = tl.program_id(0) - matrices
        block = round_block(first_to_ptr, first_ptr, block, first_size, BLOCK_E)
        block = round_block(second_to_ptr, second_ptr, block, second_size, BLOCK_E)
        round_block(third_to_ptr, third_ptr, block, third_size, BLOCK_E)
    else:
        window = tl.program_id(0) // 9
        tap = tl.program_id(0) % 9
        k = tl.arange(0, BLOCK_K)
        source = k[:, None]
        target = k[None, :]
        at, real = weight_index(window, tap, source, target, GROUPS, WIDTH, PADDED, GROUP, LAST)
        weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(tl.float32)
        weight = round_to(weight, packed_ptr.dtype.element_ty)
        matrix = window * 9 + tap
        tl.store(packed_ptr + (matrix * BLOCK_K + source) * BLOCK_K + target, weight)
        matrix = matrices + window * 9 + (8 - tap if MIRROR else tap)
        tl.store(packed_ptr + (matrix * BLOCK_K + target) * BLOCK_K + source, weight)


@triton.jit(do_not_specialize=["splits"])
def reduce_weight_gradient(
    gradient_ptr,
    partial_ptr,
    splits,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum `partial [splits, windows, 9, BLOCK_K, BLOCK_K]` float32 into `gradient [N*D, D, 3, 3]`.

    Grid: windows * 9 * (BLOCK_K^2 / BLOCK_E). The order of the additions depends on nothing but
    `splits`.
    """
    CHUNKS: tl.constexpr = BLOCK_K * BLOCK_K // BLOCK_E
    matrix = tl.program_id(0) // CHUNKS
    element = (tl.program_id(0) % CHUNKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    matrices: tl.constexpr = (GROUPS + GROUP - 1) // GROUP * 9
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = (start + s)[:, None].to(tl.int64)
        at = (split * matrices + matrix) * (BLOCK_K * BLOCK_K) + element[None, :]
        total += tl.load(partial_ptr + at, mask=split < splits, other=0.0)
    at, real = weight_index(
        matrix // 9,
        matrix % 9,
        element // BLOCK_K,
        element % BLOCK_K,
        GROUPS,
        WIDTH,
        PADDED,
        GROUP,
        LAST,
    )
    value = tl.sum(total, 0)
    tl.store(gradient_ptr + at, round_to(value, gradient_ptr.dtype.element_ty), mask=real)


hash_in_order(globals())
