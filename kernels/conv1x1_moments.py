"""Triton: the first two moments of activations, from which those of every 1x1 convolution of them
follow; the first of two stages.

With mean `m` and scatter `S = sum (a - m)(a - m)^T` over n pixels, `y = W a` has the sum `n W m`
and the sums of squared deviations `diag(W S W^T)`. `E[a a^T] - m m^T` would lose what is small
beside the mean; here a centre that all programs share is subtracted before the product, and the
launch corrects for what is left of the mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv1x1_tiles import load_tile, load_vector
from .tile import activate, dot, hash_in_order, round_to


@triton.jit
def activations(
    x_ptr,
    scale,
    bias,
    first,
    real,
    n,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """A tile of `relu(scale x + bias)` from row `first` on, rounded, as float32."""
    k = tl.arange(0, BLOCK_K)
    at = first * CHANNELS + k[:, None] * CHANNELS + n[None, :]
    a = load_tile(x_ptr + at, real, n < CHANNELS, WHOLE_N)
    return activate(a, scale, bias, real, AFFINE, False).to(tl.float32)


@triton.jit
def centre(
    x_ptr,
    scale,
    bias,
    rows,
    n,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """The mean of the activations in the first BLOCK_K rows, `[1, channels]` float32.

    It is rounded to the dtype of the activations, so that a deviation from it is rounded where an
    activation differs from it in size alone: all that the ReLU has set to 0 deviate exactly.
    """
    count = tl.minimum(rows, BLOCK_K)
    real = (tl.arange(0, BLOCK_K) < count)[:, None]
    first = tl.full((), 0, tl.int64)
    a = activations(x_ptr, scale, bias, first, real, n, CHANNELS, BLOCK_K, WHOLE_N, AFFINE)
    mean = tl.sum(tl.where(real, a, 0.0), 0) / count.to(tl.float32)
    return round_to(mean, x_ptr.dtype.element_ty).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def activation_moments(
    partial_ptr,
    sums_ptr,
    centre_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of `d` and of `d d^T`, with `d = a - centre` and `a = relu(scale x + bias)`.

    Grid: shares * blocks of the product on and above its diagonal, of BLOCK_N by BLOCK_N channels;
    what is below stays unwritten. `x [rows, CHANNELS]` in tiles of BLOCK_K rows; float32: `scale`,
    `bias [CHANNELS]` or None, `partial [shares, CHANNELS, CHANNELS]`, `centre [CHANNELS]`, and
    `sums [shares, 2, CHANNELS]`, of `d` and of `d` as the product multiplies it, rounded.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    COLUMNS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = COLUMNS * (COLUMNS + 1) // 2
    WHOLE_N: tl.constexpr = CHANNELS % BLOCK_N == 0
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    share = tl.program_id(0) // BLOCKS
    # Blocks are counted along the rows of the triangle.
    row = 0
    column = tl.program_id(0) % BLOCKS
    for _ in tl.static_range(COLUMNS - 1):
        beyond = (column >= COLUMNS - row).to(tl.int32)
        column -= beyond * (COLUMNS - row)
        row += beyond
    column += row
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = load_vector(scale_ptr, n, n < CHANNELS, 0.0, WHOLE_N)
    bias = load_vector(bias_ptr, n, n < CHANNELS, 0.0, WHOLE_N)
    middle = centre(x_ptr, scale, bias, rows, n, CHANNELS, BLOCK_K, WHOLE_N, AFFINE)
    if COLUMNS > 1:
        m = row * BLOCK_N + tl.arange(0, BLOCK_N)
        other_scale = load_vector(scale_ptr, m, m < CHANNELS, 0.0, WHOLE_N)
        other_bias = load_vector(bias_ptr, m, m < CHANNELS, 0.0, WHOLE_N)
        other_middle = centre(
            x_ptr, other_scale, other_bias, rows, m, CHANNELS, BLOCK_K, WHOLE_N, AFFINE
        )
    exact = tl.zeros((BLOCK_N,), tl.float32)
    rounded = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for tile in range(share, tl.cdiv(rows, BLOCK_K), tl.num_programs(0) // BLOCKS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_K
        real = (k < rows - tile * BLOCK_K)[:, None]
        d = activations(x_ptr, scale, bias, first, real, n, CHANNELS, BLOCK_K, WHOLE_N, AFFINE)
        d = tl.where(real, d - middle, 0.0)
        product = round_to(d, DTYPE)
        exact += tl.sum(d, 0)
        rounded += tl.sum(product.to(tl.float32), 0)
        other = product
        if COLUMNS > 1:
            # Zeros in one of the two are enough.
            other = activations(
                x_ptr,
                other_scale,
                other_bias,
                first,
                real,
                m,
                CHANNELS,
                BLOCK_K,
                WHOLE_N,
                AFFINE,
            )
            other = round_to(other - other_middle, DTYPE)
        acc = dot(tl.trans(other), product, acc, PRECISION)
    m = row * BLOCK_N + tl.arange(0, BLOCK_N)
    out = partial_ptr + share.to(tl.int64) * (CHANNELS * CHANNELS)
    out += m[:, None] * CHANNELS + n[None, :]
    tl.store(out, acc, mask=(m < CHANNELS)[:, None] & (n < CHANNELS)[None, :])
    if row == column:
        out = sums_ptr + share.to(tl.int64) * (2 * CHANNELS) + n
        tl.store(out, exact, mask=n < CHANNELS)
        tl.store(out + CHANNELS, rounded, mask=n < CHANNELS)
        tl.store(centre_ptr + n, tl.reshape(middle, (BLOCK_N,)), mask=n < CHANNELS)


hash_in_order(globals())
