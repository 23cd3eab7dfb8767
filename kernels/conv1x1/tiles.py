"""Tile-level helpers that the 1x1 convolution kernels share.

A map `[B, H, W, C]` is a matrix with a row for each pixel. Programs take tiles of BLOCK_M rows by
turns. What they load or store is a tile `[BLOCK_M, a block of channels]`; a tile's rows are *real*
up to the last pixel, and its channels *inside* up to the last channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import activate, dot, hash_in_order, rectify_real, round_to


@triton.jit
def load_vector(ptr, channel, inside, default, WHOLE: tl.constexpr):
    """One float32 number for each channel, `[1, channels]`; `default` where there are none."""
    if ptr is None:
        value = default
    elif WHOLE:
        value = tl.load(ptr + channel)[None, :]
    else:
        value = tl.load(ptr + channel, mask=inside, other=0.0)[None, :]
    return value


@triton.jit
def load_tile(ptrs, real, inside, WHOLE: tl.constexpr):
    """A tile, 0 outside; WHOLE says that all its channels are inside."""
    return tl.load(ptrs, mask=real if WHOLE else real & inside[None, :], other=0.0)


@triton.jit
def store_tile(ptrs, tile, real, inside, WHOLE: tl.constexpr):
    """Store what is real and inside."""
    if WHOLE:
        tl.store(ptrs, tile, mask=real)
    else:
        tl.store(ptrs, tile, mask=real & inside[None, :])


@triton.jit
def load_weight(
    ptr, first, second, SECONDS: tl.constexpr, FIRSTS: tl.constexpr, WHOLE: tl.constexpr
):
    """A block `[first, second]` of a weight `[FIRSTS, SECONDS]`, 0 outside."""
    ptrs = ptr + first[:, None] * SECONDS + second[None, :]
    if WHOLE:
        block = tl.load(ptrs)
    else:
        inside = (first < FIRSTS)[:, None] & (second < SECONDS)[None, :]
        block = tl.load(ptrs, mask=inside, other=0.0)
    return block


@triton.jit
def resident_operands(
    scale_ptr,
    bias_ptr,
    weight_ptr,
    n,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
):
    """What `add_product` needs for all input channels at once; nothing if it takes steps."""
    WHOLE_K: tl.constexpr = INPUTS % BLOCK_K == 0
    if INPUTS > BLOCK_K:
        resident = (0.0, 0.0, 0.0)
    else:
        k = tl.arange(0, BLOCK_K)
        resident = (
            load_weight(weight_ptr, n, k, INPUTS, OUTPUTS, WHOLE_K and WHOLE_N),
            load_vector(scale_ptr, k, k < INPUTS, 0.0, WHOLE_K),
            load_vector(bias_ptr, k, k < INPUTS, 0.0, WHOLE_K),
        )
    return resident


@triton.jit
def add_product(
    acc,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    resident,
    first,
    m,
    n,
    real,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of `W relu(scale x + bias)` to `acc [BLOCK_N, BLOCK_M]`.

    `resident` are the weight and the two vectors where they are the same for all tiles.
    """
    WHOLE_K: tl.constexpr = INPUTS % BLOCK_K == 0
    WHOLE: tl.constexpr = WHOLE_K and OUTPUTS % BLOCK_N == 0
    x = x_ptr + first * INPUTS + m[:, None] * INPUTS
    for start in range(0, INPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < INPUTS
        if INPUTS <= BLOCK_K:
            weight, scale, bias = resident
        else:
            weight = load_weight(weight_ptr, n, k, INPUTS, OUTPUTS, WHOLE)
            scale = load_vector(scale_ptr, k, inside, 0.0, WHOLE_K)
            bias = load_vector(bias_ptr, k, inside, 0.0, WHOLE_K)
        a = load_tile(x + k[None, :], real, inside, WHOLE_K)
        a = activate(a, scale, bias, real, scale_ptr is not None, True)
        acc = dot(weight, tl.trans(a), acc, PRECISION)
    return acc


@triton.jit
def add_residual(h, residual, scale, bias, MAPPED: tl.constexpr):
    """`h + residual`, float32; the residual has a map if MAPPED."""
    residual = residual.to(tl.float32)
    if MAPPED:
        residual = residual * scale + bias
    return h + residual


@triton.jit
def join(y, residual, scale, bias, residual_scale, residual_bias, real, MAPPED: tl.constexpr):
    """`relu(scale y + bias + residual)` in the dtype of `y`, 0 in rows that are not real; the
    residual has a map if MAPPED."""
    h = y.to(tl.float32) * scale + bias
    h = add_residual(h, residual, residual_scale, residual_bias, MAPPED)
    return rectify_real(h, real, y.dtype)


@triton.jit
def pack_bits(x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where a tile is above 0: eight channels in a byte, the lowest bit first."""
    bits = (x.to(tl.float32) > 0).to(tl.int32) << (tl.arange(0, BLOCK_K) % 8)[None, :]
    return tl.sum(tl.reshape(bits, (BLOCK_M, BLOCK_K // 8, 8)), 2).to(tl.uint8)


@triton.jit
def unpack_bits(signs, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the tile was above 0, from its bytes `[BLOCK_M, BLOCK_K / 8]`."""
    wide = tl.broadcast_to(signs.to(tl.int32)[:, :, None], (BLOCK_M, BLOCK_K // 8, 8))
    bits = tl.reshape(wide, (BLOCK_M, BLOCK_K)) >> (tl.arange(0, BLOCK_K) % 8)[None, :]
    return (bits & 1) != 0


@triton.jit
def add_statistics_gradient(grad, y, gain, curve, level, GAIN: tl.constexpr, WITH_Y: tl.constexpr):
    """`gain grad + curve y + level` in the dtype of `grad`. Rows that are not real come out as
    `level`: what is computed from them is never stored, and the caller clears what it sums."""
    d = grad
    if GAIN:
        d = d.to(tl.float32) * gain
    if WITH_Y:
        d = d.to(tl.float32) + (y.to(tl.float32) * curve + level)
    return round_to(d, grad.dtype) if GAIN or WITH_Y else d


@triton.jit
def add_moments(moments, acc, left):
    """Merge a tile's (count, sum, M2) by channel into those of the tiles before it, by Chan's
    formula: `acc [channels, BLOCK_M]`, of whose columns `left` are real and the others 0.

    M2 is taken about the tile's own mean.
    """
    count, total, m2 = moments
    own_count = left.to(tl.float32)
    own_total = tl.sum(acc, 1)
    mean = own_total / own_count
    off = acc - mean[:, None]
    if left < acc.shape[1]:
        off = tl.where((tl.arange(0, acc.shape[1]) < left)[None, :], off, 0.0)
    apart = mean - total / tl.maximum(count, 1.0)
    m2 += tl.sum(off * off, 1) + apart * apart * (count * own_count / (count + own_count))
    return count + own_count, total + own_total, m2


@triton.jit
def column_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What `add_rows` adds to, 0: with rows for as many as eight warps read at a time."""
    ROWS: tl.constexpr = min(BLOCK_M, 2048 // BLOCK_N)
    return tl.zeros((ROWS, BLOCK_N), tl.float32)


@triton.jit
def add_rows(sums, tile):
    """Add the rows of a tile to `sums [rows, channels]`, without an exchange between threads."""
    ROWS: tl.constexpr = sums.shape[0]
    parts = tl.reshape(tile.to(tl.float32), (tile.shape[0] // ROWS, ROWS, tile.shape[1]))
    return sums + tl.sum(parts, 0)


@triton.jit
def store_vectors(ptr, part, channel, inside, vectors, CHANNELS: tl.constexpr):
    """Vectors by channel from one program, to `ptr [parts, len(vectors), CHANNELS]`."""
    COUNT: tl.constexpr = len(vectors)
    out = ptr + part.to(tl.int64) * (COUNT * CHANNELS) + channel
    for i in tl.static_range(COUNT):
        tl.store(out + i * CHANNELS, vectors[i], mask=inside)


hash_in_order(globals())
