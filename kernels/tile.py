"""Tile-level helpers that the kernels share.

A *window* is a run of channels that holds whole branches: GROUP branches of WIDTH channels, padded
to BLOCK_K. Tiles are `[windows, pixels, channels of a window]`, so that one batched product gives
every warp a window of its own. A window that several warps share (MATRIX) has no dimension of
windows: of a batched product each of its warps computes all, in Triton before 3.9.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32; the interpreter multiplies the bits of bfloat16, so it widens."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even; the interpreter truncates to bfloat16 by itself."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # Adding to the bits of a NaN could carry it into infinity or zero.
        bits = tl.where(x != x, 0x7FC00000, rounded).to(tl.uint32)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def rectify(x):
    """ReLU that keeps NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rectify_real(h, real, dtype: tl.constexpr, MASKED: tl.constexpr = True):
    """`relu(h)` in another dtype; with MASKED 0 in rows that are not real.

    Rounding before the ReLU gives the same numbers and lets two of them share an instruction; the
    interpreter would compare the bits of bfloat16.
    """
    if INTERPRETED:
        h = rectify(h)
        return round_to(tl.where(real, h, 0.0) if MASKED else h, dtype)
    # Triton 3.6 takes bfloat16 through float32 here; for 3.9 the casts are nothing.
    h = rectify(round_to(h, dtype)).to(dtype)
    if MASKED:
        # The smaller of the two: a select would unpack pairs of 16-bit numbers.
        limit = tl.where(real, float("inf"), 0.0).to(dtype)
        limit = tl.broadcast_to(limit, h.shape)
        h = tl.minimum(h, limit, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    return h


@triton.jit
def bounded(h, SIGNED: tl.constexpr):
    """`h` with the largest number in the place of NaN and infinity, so that 0 times it is 0.

    Without SIGNED nothing is below 0. The smaller of the two: a select would unpack pairs of 16-bit
    numbers.
    """
    # That of float16, or of bfloat16, which TF32 does not round to infinity as it does float32's.
    LARGEST: tl.constexpr = 65504.0 if h.dtype == tl.float16 else 3.3895313892515355e38
    x = h
    if INTERPRETED:
        x = h.to(tl.float32)
        # In Triton 3.6 the interpreter's smaller number of NaN and another is NaN.
        x = tl.where(x == x, x, LARGEST)
    x = tl.minimum(x, LARGEST)
    if SIGNED:
        x = tl.maximum(x, -LARGEST)
    return x.to(h.dtype)


@triton.jit
def infinite_if_negative(energy):
    """What was summed as minus infinity is an infinite energy, and not a small one rounded below 0.

    The product of an infinity with the other channels of its branch may have either sign.
    """
    return tl.where(energy == float("-inf"), float("inf"), energy)


@triton.jit
def activate(z, scale, bias, real, AFFINE: tl.constexpr, MASKED: tl.constexpr):
    """`relu(scale z + bias)` in the dtype of `z`, 0 in rows that are not real; `z` without AFFINE.

    The affine map is float32. A row that is not real is 0 in `z`, but its image under the map need
    not be; padded channels have a map of 0.
    """
    # Triton 3.6 compiles what follows a return, too: one return, at the end.
    h = z
    if AFFINE:
        h = rectify_real(z.to(tl.float32) * scale + bias, real, z.dtype, MASKED)
    return h


@triton.jit
def rounded_product(a, b):
    """`a b`, float32, rounded before a sum takes it.

    A product that goes straight into a sum is otherwise fused with the first addition: a lane adds
    the rounded product of its neighbour to its own unrounded one. The neighbour does the reverse,
    so that the lanes of a sum hold different last bits, and which of them is stored is undefined.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def by_branch(x, WIDTH: tl.constexpr, GROUP_P: tl.constexpr):
    """Sums over the channels of each branch: `[windows, BLOCK_K]` to `[windows, GROUP_P]`."""
    owner = tl.arange(0, x.shape[1]) // WIDTH
    mine = owner[:, None] == tl.arange(0, GROUP_P)[None, :]
    return tl.sum(tl.where(mine[None, :, :], x[:, :, None], 0.0), 1)


@triton.jit
def form_entries(
    windows,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where the `D x D` matrices of the branches, `[N, D, D]`, lie on the diagonals of windows.

    Offsets, and which of them are real, both `[windows, BLOCK_K, BLOCK_K]`; None for the latter
    where all are, so that the loads stay wide.
    """
    k = tl.arange(0, BLOCK_K)
    if WIDTH == BLOCK_K:
        offsets = (windows[:, None, None] * WIDTH + k[None, :, None]) * WIDTH + k[None, None, :]
        within = offsets < BRANCHES * WIDTH * WIDTH
    else:
        owner = k // WIDTH
        lane = k % WIDTH
        branch = windows[:, None, None] * GROUP + owner[None, :, None]
        offsets = (branch * WIDTH + lane[None, :, None]) * WIDTH + lane[None, None, :]
        same = (owner[:, None] == owner[None, :]) & (owner < GROUP)[:, None]
        within = same[None, :, :] & (branch < BRANCHES)
    return offsets, within


@triton.jit
def matrix_entries(windows, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """As `form_entries`, of a MATRIX, which is one branch: both `[BLOCK_K, BLOCK_K]`."""
    k = tl.arange(0, BLOCK_K)
    offsets = (windows[:, None] * WIDTH + k[:, None]) * WIDTH + k[None, :]
    return offsets, (k < WIDTH)[:, None] & (k < WIDTH)[None, :]


@triton.jit
def window_channels(
    program,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The windows of a program, their channels, and which of those are real.

    Returns:
        `[windows]`, `[windows, BLOCK_K]` and `[windows, BLOCK_K]`.
    """
    windows = program * WINDOWS + tl.arange(0, WINDOWS)
    k = tl.arange(0, BLOCK_K)
    channel = windows[:, None] * (GROUP * WIDTH) + k[None, :]
    inside = (k < GROUP * WIDTH)[None, :] & (channel < BRANCHES * WIDTH)
    return windows, channel, inside


@triton.jit
def over_pixels(x, MATRIX: tl.constexpr):
    """Numbers of the channels, `[windows, BLOCK_K]`, with a dimension of pixels.

    They become `[windows, 1, BLOCK_K]`; those of a MATRIX stay `[1, BLOCK_K]`.
    """
    return x if MATRIX else x[:, None, :]


@triton.jit
def load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX: tl.constexpr = False):
    """The affine map of each channel, as of `over_pixels`; zeros where there is none."""
    if scale_ptr is None:
        return 0.0, 0.0
    else:
        scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
        return over_pixels(scale, MATRIX), over_pixels(bias, MATRIX)


@triton.jit
def load_rows(
    rows,
    start,
    inside,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    """A tile `[windows, BLOCK_P, BLOCK_K]` from pixel `start` on, 0 where there is none.

    Args:
        rows: pointers to the windows' channels at pixel 0, as of `over_pixels`; of a matrix the
            tile is `[BLOCK_P, BLOCK_K]`.
        inside: which channels are real, `[windows, BLOCK_K]`; all of them when FULL.

    Returns:
        The tile, which of its rows are real `[1, BLOCK_P, 1]`, and their offsets from `rows`.
    """
    MATRIX: tl.constexpr = len(rows.shape) == 2
    p = start + tl.arange(0, BLOCK_P)
    offsets = (p[:, None] if MATRIX else p[None, :, None]) * CHANNELS
    real = (p < PIXELS)[:, None] if MATRIX else (p < PIXELS)[None, :, None]
    if FULL and PIXELS % BLOCK_P == 0:
        tile = tl.load(rows + offsets)
    elif FULL:
        tile = tl.load(rows + offsets, mask=real, other=0.0)
    else:
        tile = tl.load(rows + offsets, mask=real & over_pixels(inside, MATRIX), other=0.0)
    return tile, real, offsets


@triton.jit
def store_rows(
    pointers,
    tile,
    real,
    inside,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store the real elements of a tile that belongs to what `load_rows` returned."""
    if FULL and PIXELS % BLOCK_P == 0:
        tl.store(pointers, tile)
    elif FULL:
        tl.store(pointers, tile, mask=real)
    else:
        tl.store(pointers, tile, mask=real & over_pixels(inside, len(tile.shape) == 2))


def hash_in_order(module: dict[str, Any]) -> None:
    """Hash the kernels of a module in the order of their definition.

    In Triton 3.6 the cache key of a kernel depends on whether its helpers were hashed before it;
    one order makes the keys of kernels built ahead of time those of the running program.
    """
    for value in list(module.values()):
        if isinstance(value, triton.runtime.jit.JITCallable):
            value.cache_key  # noqa: B018


hash_in_order(globals())
