"""Tiles of the grouped 3x3 convolution that its three kernels share.

B samples, H x W maps, CHANNELS = windows * WINDOW channels in rows: channels-last. A window of
WINDOW <= BLOCK_K channels holds whole groups; its weights are block-diagonal, and zero in the
channels that fill it up. A program takes BLOCK_M lanes of one window and walks down `part_rows`
rows. Windows are next to each other in the grid: their channels share cache lines.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import activate, dot, hash_in_order


@triton.jit
def locate(part, batch, columns, rows, part_rows, BLOCK_M: tl.constexpr):
    """Sample and column of each lane of a part of the work, its first row, and which lanes exist.

    `columns` is the number of lanes in a row. The segments of `part_rows` rows of the same lanes
    are next to each other, since they share input rows.
    """
    segments = tl.cdiv(rows, part_rows)
    lane = (part // segments) * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = (lane // columns).to(tl.int64)
    return sample, lane % columns, (part % segments) * part_rows, sample < batch


@triton.jit
def load_channels(ptr, channel, inside, default):
    """A float32 vector of per-channel numbers as a row, or `default` where there is no tensor."""
    if ptr is None:
        return default
    else:  # noqa: RET505 (Triton compiles what follows a return)
        return tl.load(ptr + channel, mask=inside, other=0.0)[None, :]


@triton.jit
def load_taps(weight_ptr, window, BLOCK_K: tl.constexpr):
    """The packed weights of a window by rows of the kernel, `[BLOCK_K (in), BLOCK_K (out)]`."""
    k = tl.arange(0, BLOCK_K)
    SIZE: tl.constexpr = BLOCK_K * BLOCK_K
    tile = weight_ptr + window * (9 * SIZE) + k[:, None] * BLOCK_K + k[None, :]
    return (
        (tl.load(tile), tl.load(tile + SIZE), tl.load(tile + 2 * SIZE)),
        (tl.load(tile + 3 * SIZE), tl.load(tile + 4 * SIZE), tl.load(tile + 5 * SIZE)),
        (tl.load(tile + 6 * SIZE), tl.load(tile + 7 * SIZE), tl.load(tile + 8 * SIZE)),
    )


@triton.jit
def around_pair(column, W, real):
    """Whether the four columns around the pair that starts at `column` are in the map."""
    return (
        (real & (column > 0))[:, None],
        real[:, None],
        (real & (column + 1 < W))[:, None],
        (real & (column + 2 < W))[:, None],
    )


@triton.jit
def at_row(valid, row, rows):
    """`valid`, if the row is one of the map's."""
    # One unsigned comparison for both ends. The interpreter cannot join a scalar to a block.
    row = tl.zeros(valid.shape, tl.uint32) + row.to(tl.uint32)
    return valid & (row < rows.to(tl.uint32))


@triton.jit
def load_input(ptr, row, rows, valid, inside, affine, AFFINE: tl.constexpr):
    """`relu(scale x + bias)` at one pixel a lane, 0 in the padding around the map."""
    valid = at_row(valid, row, rows)
    x = tl.load(ptr, mask=valid & inside, other=0.0)
    return activate(x, affine[0], affine[1], valid, AFFINE, True)


@triton.jit
def load_four_inputs(
    ptr, row, rows, valid, inside, affine, CHANNELS: tl.constexpr, AFFINE: tl.constexpr
):
    """`load_input` at four adjacent columns; `ptr` points to the second."""
    return (
        load_input(ptr - CHANNELS, row, rows, valid[0], inside, affine, AFFINE),
        load_input(ptr, row, rows, valid[1], inside, affine, AFFINE),
        load_input(ptr + CHANNELS, row, rows, valid[2], inside, affine, AFFINE),
        load_input(ptr + 2 * CHANNELS, row, rows, valid[3], inside, affine, AFFINE),
    )


@triton.jit
def load_three(ptr, row, rows, valid, inside, CHANNELS: tl.constexpr):
    """Three adjacent columns as they are, 0 outside; `ptr` points to the second."""
    return (
        tl.load(ptr - CHANNELS, mask=at_row(valid[0], row, rows) & inside, other=0.0),
        tl.load(ptr, mask=at_row(valid[1], row, rows) & inside, other=0.0),
        tl.load(ptr + CHANNELS, mask=at_row(valid[2], row, rows) & inside, other=0.0),
    )


@triton.jit
def activate_three(x, row, rows, valid, affine, AFFINE: tl.constexpr):
    """`relu(scale x + bias)` of what `load_three` gave, 0 in the padding around the map."""
    return (
        activate(x[0], affine[0], affine[1], at_row(valid[0], row, rows), AFFINE, True),
        activate(x[1], affine[0], affine[1], at_row(valid[1], row, rows), AFFINE, True),
        activate(x[2], affine[0], affine[1], at_row(valid[2], row, rows), AFFINE, True),
    )


@triton.jit
def load_three_inputs(
    ptr, row, rows, valid, inside, affine, CHANNELS: tl.constexpr, AFFINE: tl.constexpr
):
    """`load_input` at three adjacent columns; `ptr` points to the second."""
    x = load_three(ptr, row, rows, valid, inside, CHANNELS)
    return activate_three(x, row, rows, valid, affine, AFFINE)


@triton.jit
def add_three(a0, a1, a2, taps, acc, PRECISION: tl.constexpr):
    """One row of the kernel at one output column."""
    acc = dot(a0, taps[0], acc, PRECISION)
    acc = dot(a1, taps[1], acc, PRECISION)
    return dot(a2, taps[2], acc, PRECISION)


@triton.jit
def add_six(a, taps, acc, PRECISION: tl.constexpr):
    """One row of the kernel at two adjacent output columns."""
    return (
        add_three(a[0], a[1], a[2], taps, acc[0], PRECISION),
        add_three(a[1], a[2], a[3], taps, acc[1], PRECISION),
    )


hash_in_order(globals())
