"""Triton: the grouped 3x3 convolution, forward, with BatchNorm's affine map and ReLU on the way in

Letters and windows as in kernels/conv3x3/tiles.py; OH x OW maps out. The kernels are
row-stationary: each input row is read once, activated once, and added to the three output rows that
it touches. With stride 1 a lane is two adjacent output columns, so that it reads four input columns
instead of six.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import (
    bounded,
    dot,
    hash_in_order,
    infinite_if_negative,
    rectify_real,
    round_to,
)

from .tiles import (
    add_six,
    add_three,
    around_pair,
    load_channels,
    load_four_inputs,
    load_taps,
    load_three_inputs,
    locate,
)


@triton.jit
def add_moments(moments, acc):
    """Add one value a lane to its sum and its sum of squares."""
    return moments[0] + acc, moments[1] + acc * acc


@triton.jit
def merge_lanes(ptr, part, channel, inside, left, n_left, right, n_right, CHANNELS: tl.constexpr):
    """(count, sum, M2) of a program from the moments of its lanes, by Chan's formula.

    A lane has summed at most `part_rows` values, so that its own M2 loses little to cancellation;
    nothing above it is a difference of large sums. Lanes outside the map hold meaningless numbers.
    """
    sum_left = tl.where(n_left > 0, left[0], 0.0)
    sum_right = tl.where(n_right > 0, right[0], 0.0)
    mean_left = sum_left / tl.maximum(n_left, 1.0)
    mean_right = sum_right / tl.maximum(n_right, 1.0)
    count = tl.sum(n_left + n_right, 0)
    total = tl.sum(sum_left + sum_right, 0)
    mean = (total / tl.maximum(count, 1.0))[None, :]
    m2 = tl.where(n_left > 0, tl.maximum(left[1] - sum_left * mean_left, 0.0), 0.0)
    m2 += tl.where(n_right > 0, tl.maximum(right[1] - sum_right * mean_right, 0.0), 0.0)
    m2 += n_left * (mean_left - mean) * (mean_left - mean)
    m2 += n_right * (mean_right - mean) * (mean_right - mean)
    out = ptr + part.to(tl.int64) * (3 * CHANNELS) + channel
    tl.store(out, tl.broadcast_to(count, total.shape), mask=inside)
    tl.store(out + CHANNELS, total, mask=inside)
    tl.store(out + 2 * CHANNELS, tl.sum(m2, 0), mask=inside)


@triton.jit(do_not_specialize=["batch", "H", "W", "part_rows"])
def forward_stride1(
    y_ptr,
    partial_ptr,
    energy_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    after_ptr,
    keep_ptr,
    form_ptr,
    batch,
    H,
    W,
    part_rows,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FOLDED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = conv(relu(scale x + bias))`, padding 1, two output columns a lane.

    Grid: windows * parts, parts = ceil(H / part_rows) * ceil(B ceil(W / 2) / BLOCK_M). `y`,
    `x [B, H, W, CHANNELS]`; `scale`, `bias [CHANNELS]` float32 or None; `weight [windows, 9,
    BLOCK_K, BLOCK_K]` in the dtype of `x`; `partial [parts, 3, CHANNELS]` float32 or None.

    FOLDED is of evaluation: `y = keep relu(conv(x) + after)`, `after [CHANNELS]` and `keep
    [B, CHANNELS]` float32, `keep` or None; and with `form [windows, 1 or 2, BLOCK_K, BLOCK_K]` in
    the dtype of `x`, two for 16 bits, the part of every lane in the energies, `energy
    [ceil(H / part_rows), B, ceil(W / 2), N]` float32. PADDED is the channels of a branch.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    STATISTICS: tl.constexpr = partial_ptr is not None
    ENERGIES: tl.constexpr = form_ptr is not None
    TERMS: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2
    window = tl.program_id(0) % (CHANNELS // WINDOW)
    part = tl.program_id(0) // (CHANNELS // WINDOW)
    sample, column, first, real = locate(part, batch, (W + 1) // 2, H, part_rows, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    affine = (
        load_channels(scale_ptr, channel, k < WINDOW, 0.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    top, middle, bottom = load_taps(weight_ptr, window, BLOCK_K)
    forms = load_forms(form_ptr, window, BLOCK_K, TERMS)
    kept = load_kept(keep_ptr, sample, real, channel, k < WINDOW, CHANNELS)
    lane = ((first // part_rows) * batch.to(tl.int64) + sample) * ((W + 1) // 2) + column
    column = column * 2
    valid = around_pair(column, W, real)
    step = W.to(tl.int64) * CHANNELS
    at = ((sample * H + first) * W + column)[:, None] * CHANNELS + channel[None, :]
    x = x_ptr + at - step
    y = y_ptr + at
    zero = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    start = first_sums(after_ptr, channel, k < WINDOW, BLOCK_M, BLOCK_K)

    a = load_four_inputs(x, first - 1, H, valid, inside, affine, CHANNELS, AFFINE)
    acc = add_six(a, top, (start, start), PRECISION)
    x += step
    a = load_four_inputs(x, first, H, valid, inside, affine, CHANNELS, AFFINE)
    acc = add_six(a, middle, acc, PRECISION)
    below = add_six(a, top, (start, start), PRECISION)
    left = (zero, zero)
    right = (zero, zero)
    energies = (zero, zero)
    rows = tl.minimum(part_rows, H - first)
    for i in range(rows):
        x += step
        a = load_four_inputs(x, first + 1 + i, H, valid, inside, affine, CHANNELS, AFFINE)
        acc = add_six(a, bottom, acc, PRECISION)
        one = finish(acc[0], kept, y_ptr.dtype.element_ty, FOLDED)
        other = finish(acc[1], kept, y_ptr.dtype.element_ty, FOLDED)
        tl.store(y, one, mask=valid[1] & inside)
        tl.store(y + CHANNELS, other, mask=valid[2] & inside)
        y += step
        if STATISTICS:
            left = add_moments(left, acc[0])
            right = add_moments(right, acc[1])
        if ENERGIES:
            energies = (
                add_energies(one, forms, energies[0], TERMS, WINDOW > PADDED, PRECISION),
                add_energies(other, forms, energies[1], TERMS, WINDOW > PADDED, PRECISION),
            )
        acc = add_six(a, middle, below, PRECISION)
        below = add_six(a, top, (start, start), PRECISION)
    if STATISTICS:
        n_left = tl.where(valid[1], rows, 0).to(tl.float32)
        n_right = tl.where(valid[2], rows, 0).to(tl.float32)
        merge_lanes(partial_ptr, part, channel, k < WINDOW, left, n_left, right, n_right, CHANNELS)
    if ENERGIES:
        # Columns outside the map have sums of what is next to them.
        both = tl.where(valid[1], energies[0], 0.0) + tl.where(valid[2], energies[1], 0.0)
        BRANCHES: tl.constexpr = CHANNELS // PADDED
        GROUP: tl.constexpr = WINDOW // PADDED
        store_energies(energy_ptr, both, lane, real, window, BRANCHES, GROUP, PADDED, BLOCK_K)


@triton.jit(do_not_specialize=["batch", "H", "W", "part_rows"])
def forward_stride2(
    y_ptr,
    partial_ptr,
    energy_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    after_ptr,
    keep_ptr,
    form_ptr,
    batch,
    H,
    W,
    part_rows,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FOLDED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `forward_stride1` with stride 2: one output column a lane, two input rows a step.

    parts = ceil(OH / part_rows) * ceil(B OW / BLOCK_M); `y [B, OH, OW, CHANNELS]`; `energy
    [ceil(OH / part_rows), B, OW, N]`.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    STATISTICS: tl.constexpr = partial_ptr is not None
    ENERGIES: tl.constexpr = form_ptr is not None
    TERMS: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.float32 else 2
    OH = (H + 1) // 2
    OW = (W + 1) // 2
    window = tl.program_id(0) % (CHANNELS // WINDOW)
    part = tl.program_id(0) // (CHANNELS // WINDOW)
    sample, column, first, real = locate(part, batch, OW, OH, part_rows, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    channel = window * WINDOW + k
    inside = (k < WINDOW)[None, :]
    affine = (
        load_channels(scale_ptr, channel, k < WINDOW, 0.0),
        load_channels(bias_ptr, channel, k < WINDOW, 0.0),
    )
    top, middle, bottom = load_taps(weight_ptr, window, BLOCK_K)
    forms = load_forms(form_ptr, window, BLOCK_K, TERMS)
    kept = load_kept(keep_ptr, sample, real, channel, k < WINDOW, CHANNELS)
    lane = ((first // part_rows) * batch.to(tl.int64) + sample) * OW + column
    valid = around_pair(2 * column, W, real)
    step = W.to(tl.int64) * CHANNELS
    row = 2 * first - 1
    x = x_ptr + ((sample * H + row) * W + 2 * column)[:, None] * CHANNELS + channel[None, :]
    y = y_ptr + ((sample * OH + first) * OW + column)[:, None] * CHANNELS + channel[None, :]
    zero = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    start = first_sums(after_ptr, channel, k < WINDOW, BLOCK_M, BLOCK_K)

    a = load_three_inputs(x, row, H, valid, inside, affine, CHANNELS, AFFINE)
    acc = add_three(a[0], a[1], a[2], top, start, PRECISION)
    moments = (zero, zero)
    energies = zero
    rows = tl.minimum(part_rows, OH - first)
    for i in range(rows):
        a = load_three_inputs(x + step, row + 2 * i + 1, H, valid, inside, affine, CHANNELS, AFFINE)
        acc = add_three(a[0], a[1], a[2], middle, acc, PRECISION)
        x += 2 * step
        a = load_three_inputs(x, row + 2 * i + 2, H, valid, inside, affine, CHANNELS, AFFINE)
        acc = add_three(a[0], a[1], a[2], bottom, acc, PRECISION)
        h = finish(acc, kept, y_ptr.dtype.element_ty, FOLDED)
        tl.store(y, h, mask=valid[1] & inside)
        y += OW.to(tl.int64) * CHANNELS
        if STATISTICS:
            moments = add_moments(moments, acc)
        acc = add_three(a[0], a[1], a[2], top, start, PRECISION)
        # Behind the next sums: in front of them the compiler for sm90 keeps registers in memory.
        if ENERGIES:
            energies = add_energies(h, forms, energies, TERMS, WINDOW > PADDED, PRECISION)
    if STATISTICS:
        count = tl.where(valid[1], rows, 0).to(tl.float32)
        merge_lanes(
            partial_ptr,
            part,
            channel,
            k < WINDOW,
            moments,
            count,
            (zero, zero),
            0.0 * count,
            CHANNELS,
        )
    if ENERGIES:
        BRANCHES: tl.constexpr = CHANNELS // PADDED
        GROUP: tl.constexpr = WINDOW // PADDED
        store_energies(energy_ptr, energies, lane, real, window, BRANCHES, GROUP, PADDED, BLOCK_K)


hash_in_order(globals())


@triton.jit
def first_sums(after_ptr, channel, inside, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """What the sums of an output pixel start from: the bias behind the convolution, or 0."""
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if after_ptr is not None:
        sums += tl.load(after_ptr + channel, mask=inside, other=0.0)[None, :]
    return sums


@triton.jit
def load_kept(keep_ptr, sample, real, channel, inside, CHANNELS: tl.constexpr):
    """The removal mask (10) of each lane and channel, `[BLOCK_M, BLOCK_K]`; None without one."""
    kept = None
    if keep_ptr is not None:
        at = keep_ptr + sample[:, None] * CHANNELS + channel[None, :]
        kept = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    return kept


@triton.jit
def load_forms(form_ptr, window, BLOCK_K: tl.constexpr, TERMS: tl.constexpr):
    """The terms whose sum is `Q` of a window's branches, `[BLOCK_K, BLOCK_K]` each."""
    k = tl.arange(0, BLOCK_K)
    SIZE: tl.constexpr = BLOCK_K * BLOCK_K
    forms = (0.0, 0.0)
    if form_ptr is not None:
        tile = form_ptr + window * (TERMS * SIZE) + k[:, None] * BLOCK_K + k[None, :]
        # In float32 the second is not there, and not used.
        forms = (tl.load(tile), tl.load(tile + (TERMS - 1) * SIZE))
    return forms


@triton.jit
def finish(acc, kept, dtype: tl.constexpr, RECTIFY: tl.constexpr):
    """What is written of the sums: rounded, and with RECTIFY behind the ReLU."""
    if kept is not None:
        acc *= kept
    return rectify_real(acc, None, dtype, False) if RECTIFY else round_to(acc, dtype)


@triton.jit
def add_energies(
    h, forms, energies, TERMS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr
):
    """Add `h_k (Q h)_k` of every lane and channel k, `h >= 0`; SHARED are windows of several
    branches, where a NaN or an infinity of one must not reach the others through zeros of Q."""
    operand = bounded(h, False) if SHARED else h
    product = dot(operand, forms[0], tl.zeros(h.shape, tl.float32), PRECISION)
    if TERMS == 2:
        product = dot(operand, forms[1], product, PRECISION)
    return energies + product * h.to(tl.float32)


@triton.jit
def store_energies(
    ptr,
    energies,
    row,
    exists,
    window,
    BRANCHES: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The lanes' sums over the channels of each branch of a window, to `ptr [rows, BRANCHES]`."""
    owner = tl.arange(0, BLOCK_K) // PADDED
    out = ptr + row * BRANCHES + window * GROUP
    for branch in tl.static_range(GROUP):
        mine = energies if GROUP == 1 else tl.where((owner == branch)[None, :], energies, 0.0)
        tl.store(out + branch, infinite_if_negative(tl.sum(mine, 1)), mask=exists)


hash_in_order(globals())
