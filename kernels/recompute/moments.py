"""Triton: the first two moments of activations, from which those of every 1x1 convolution of them
follow; the first of two stages.

With mean `m` and scatter `S = sum (a - m)(a - m)^T` over n pixels, `y = W a` has the sum `n W m`
and the sums of squared deviations `diag(W S W^T)`. `E[a a^T] - m m^T` would lose what is small
beside the mean; here a centre that all programs share is subtracted before the product, and the
launch corrects for what is left of the mean. The sums of deviations, as they are multiplied, come
from tensor cores too, by a product with ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.conv1x1.backward import (
    gradient_product,
    resident_weight,
    through_map,
)
from coded_resnext.kernels.conv1x1.tiles import (
    add_product,
    add_rows,
    column_sums,
    load_tile,
    load_vector,
    resident_operands,
    store_tile,
    store_vectors,
)
from coded_resnext.kernels.tile import INTERPRETED, activate, dot, hash_in_order, round_to

# Rows of the sums of activations, and columns of ones.
SUMS = tl.constexpr(16)


@triton.jit
def activations(
    x_ptr,
    scale,
    bias,
    row,
    real,
    n,
    CHANNELS: tl.constexpr,
    WHOLE_N: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """`relu(scale x + bias)` in the rows `row [rows, 1]`, in the dtype of `x`."""
    a = load_tile(x_ptr + row * CHANNELS + n[None, :], real, n < CHANNELS, WHOLE_N)
    return activate(a, scale, bias, real, AFFINE, False)


@triton.jit
def deviations(a, middle):
    """`a - middle`, rounded once; on a GPU two of 16 bits in one instruction."""
    d = a.to(tl.float32) - middle.to(tl.float32) if INTERPRETED else a - middle
    return round_to(d, a.dtype) if INTERPRETED else d


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
    """The mean of the activations in up to BLOCK_K rows far apart, `[1, channels]`.

    It has the dtype of the activations, so that all that the ReLU has set to 0 deviate from it by a
    number of that dtype.
    """
    count = tl.minimum(rows, BLOCK_K)
    k = tl.arange(0, BLOCK_K)[:, None]
    row = k.to(tl.int64) * (rows // count)
    a = activations(x_ptr, scale, bias, row, k < count, n, CHANNELS, WHOLE_N, AFFINE)
    mean = tl.sum(tl.where(k < count, a.to(tl.float32), 0.0), 0) / count.to(tl.float32)
    return round_to(mean, a.dtype)[None, :]


@triton.jit
def add_tile(
    totals,
    x_ptr,
    tile,
    rows,
    columns,
    others,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AFFINE: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of rows, all of them real if WHOLE, to the sums and the product.

    `columns` and `others` are channels with their scale, bias and centre; the latter None if they
    are the same.
    """
    of_all, of_deviations, acc = totals
    n, scale, bias, middle = columns
    k = tl.arange(0, BLOCK_K)[:, None]
    real = k >= 0 if WHOLE else k < rows - tile * BLOCK_K
    row = (tl.full((), 0, tl.int64) + tile * BLOCK_K) + k
    a = activations(x_ptr, scale, bias, row, real, n, CHANNELS, WHOLE_N, AFFINE)
    d = deviations(a, middle)
    if not WHOLE:
        a = tl.where(real, a, 0.0).to(a.dtype)
        d = tl.where(real, d, 0.0).to(a.dtype)
    of_all = add_rows(of_all, a)
    other = d
    if others is not None:
        # Zeros in one of the two are enough.
        m, scale, bias, middle = others
        a = activations(x_ptr, scale, bias, row, real, m, CHANNELS, WHOLE_N, AFFINE)
        other = deviations(a, middle)
    acc = dot(tl.trans(d), other, acc, PRECISION)
    # The interpreter before Triton 3.9 makes no number in bfloat16, but casts one to it.
    ones = tl.full((BLOCK_K, SUMS), 1.0, tl.float32).to(a.dtype)
    return of_all, dot(tl.trans(d), ones, of_deviations, PRECISION), acc


@triton.jit
def columns_of(
    x_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    n,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
):
    """Channels with their scale, bias and centre."""
    scale = load_vector(scale_ptr, n, n < CHANNELS, 0.0, WHOLE_N)
    bias = load_vector(bias_ptr, n, n < CHANNELS, 0.0, WHOLE_N)
    AFFINE: tl.constexpr = scale_ptr is not None
    middle = centre(x_ptr, scale, bias, rows, n, CHANNELS, BLOCK_K, WHOLE_N, AFFINE)
    return n, scale, bias, middle


@triton.jit(do_not_specialize=["rows"])
def activation_moments(
    partial_ptr,
    sums_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of `a = relu(scale x + bias)`, of `d = a - centre` and of `d d^T`.

    Grid: shares * blocks of the product on and above its diagonal, of BLOCK_N by BLOCK_N channels;
    what is below is not stored. `x [rows, CHANNELS]` in tiles of BLOCK_K rows; float32: `scale`,
    `bias [CHANNELS]` or None, `partial [shares, CHANNELS, CHANNELS]`, and `sums [shares, 2,
    CHANNELS]`, of `a` and of `d`, both rounded to the dtype of `x`.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    COLUMNS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = COLUMNS * (COLUMNS + 1) // 2
    WHOLE_N: tl.constexpr = CHANNELS % BLOCK_N == 0
    share = tl.program_id(0) // BLOCKS
    shares = tl.num_programs(0) // BLOCKS
    # Blocks are counted along the rows of the triangle.
    upper = 0
    column = tl.program_id(0) % BLOCKS
    for _ in tl.static_range(COLUMNS - 1):
        beyond = (column >= COLUMNS - upper).to(tl.int32)
        column -= beyond * (COLUMNS - upper)
        upper += beyond
    column += upper
    m = column * BLOCK_N + tl.arange(0, BLOCK_N)
    n = upper * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = columns_of(x_ptr, scale_ptr, bias_ptr, rows, n, CHANNELS, BLOCK_K, WHOLE_N)
    others = None
    if COLUMNS > 1:
        others = columns_of(x_ptr, scale_ptr, bias_ptr, rows, m, CHANNELS, BLOCK_K, WHOLE_N)
    totals = (
        tl.zeros((SUMS, BLOCK_N), tl.float32),
        tl.zeros((BLOCK_N, SUMS), tl.float32),
        tl.zeros((BLOCK_N, BLOCK_N), tl.float32),
    )
    whole = rows // BLOCK_K
    for tile in range(share, whole, shares):
        totals = add_tile(
            totals,
            x_ptr,
            tile,
            rows,
            columns,
            others,
            CHANNELS,
            BLOCK_K,
            AFFINE,
            True,
            WHOLE_N,
            PRECISION,
        )
    if (whole * BLOCK_K < rows) & (whole % shares == share):
        totals = add_tile(
            totals,
            x_ptr,
            whole,
            rows,
            columns,
            others,
            CHANNELS,
            BLOCK_K,
            AFFINE,
            False,
            WHOLE_N,
            PRECISION,
        )
    of_all, of_deviations, acc = totals
    out = partial_ptr + share.to(tl.int64) * (CHANNELS * CHANNELS)
    out += n[:, None] * CHANNELS + m[None, :]
    tl.store(out, acc, mask=(n < CHANNELS)[:, None] & (m < CHANNELS)[None, :])
    if upper == column:
        sums = (tl.sum(of_all, 0), tl.sum(of_deviations, 1) / SUMS)
        store_vectors(sums_ptr, share, n, n < CHANNELS, sums, CHANNELS)


hash_in_order(globals())


@triton.jit(do_not_specialize=["rows"])
def moments_input_gradient(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    weight_ptr,
    square_ptr,
    size_ptr,
    shift_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dx = scale (V^T grad + size Q relu(scale x + bias) + t)` where `scale x + bias > 0`; without
    scale and bias `V^T grad + size Q x + t`.

    Grid: parts * ceil(INPUTS / BLOCK_N). `dx`, `x [rows, INPUTS]`, `grad [rows, OUTPUTS]`; V is
    `weight [OUTPUTS, INPUTS]`, Q the symmetric `square [INPUTS, INPUTS]`; float32: `size` is one
    number, None for 1; t is `shift [INPUTS]`, as are `scale` and `bias` or None, and with them
    `partial [parts, 2, INPUTS]`, the gradients of bias and scale. The first product takes BLOCK_K
    output channels a step, the second BLOCK_H of the input's.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    COLUMNS: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    WHOLE_N: tl.constexpr = INPUTS % BLOCK_N == 0
    part = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    size = 1.0 if size_ptr is None else tl.load(size_ptr)
    shift = load_vector(shift_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    of_output = resident_weight(None, None, None, weight_ptr, n, INPUTS, OUTPUTS, BLOCK_K, WHOLE_N)
    of_input = resident_operands(
        scale_ptr, bias_ptr, square_ptr, n, INPUTS, INPUTS, BLOCK_H, WHOLE_N
    )
    scale = load_vector(scale_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    bias = load_vector(bias_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    of_bias = column_sums(BLOCK_M, BLOCK_N)
    of_scale = column_sums(BLOCK_M, BLOCK_N)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0) // COLUMNS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_M
        left = tl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        real = (m < left)[:, None]
        acc = add_product(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
            x_ptr,
            scale_ptr,
            bias_ptr,
            square_ptr,
            of_input,
            first,
            m,
            n,
            real,
            INPUTS,
            INPUTS,
            BLOCK_H,
            BLOCK_N,
            PRECISION,
        )
        d = gradient_product(
            acc * size,
            None,
            grad_ptr,
            None,
            None,
            None,
            None,
            weight_ptr,
            of_output,
            first,
            m,
            n,
            real,
            real,
            INPUTS,
            OUTPUTS,
            BLOCK_K,
            BLOCK_N,
            PRECISION,
        )
        d = round_to(d + shift, dx_ptr.dtype.element_ty)
        if AFFINE:
            # The same load as that of the first product, where that takes all channels.
            x_row = x_ptr + first * INPUTS + m[:, None] * INPUTS
            x = load_tile(x_row + n[None, :], real, n < INPUTS, WHOLE_N)
            d, of_bias, of_scale = through_map(d, x, scale, bias, real, of_bias, of_scale)
        here = dx_ptr + first * INPUTS + m[:, None] * INPUTS + n[None, :]
        store_tile(here, round_to(d, dx_ptr.dtype.element_ty), real, n < INPUTS, WHOLE_N)
    if AFFINE:
        sums = (tl.sum(of_bias, 0), tl.sum(of_scale, 0))
        store_vectors(partial_ptr, part, n, n < INPUTS, sums, INPUTS)


hash_in_order(globals())
