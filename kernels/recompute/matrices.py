"""Triton: what BatchNorm needs of a convolution that is not stored, as algebra of its matrices.

All follows from its weight W `[O, I]`, from the moments of what it multiplies (mean m, scatter S)
and from the sums `P = sum grad a^T`: statistics and their gradients, each in one launch. Matrices
are small, and products float32 as they are: TF32 would round away what makes a small variance. Sums
over a row are float64, in which products of float32 are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.batch_norm.kernel import add_parts, store_gradients, store_map
from coded_resnext.kernels.tile import dot, hash_in_order, round_to


@triton.jit(do_not_specialize=["parts", "pixels"])
def merge_moments(
    mean_ptr,
    scatter_ptr,
    partial_ptr,
    sums_ptr,
    parts,
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`mean [C]` and the symmetric `scatter [C, C]` of all parts of `activation_moments`.

    `partial [parts, C, C]`, of which what is on and above the diagonal is read, and `sums
    [parts, 2, C]`: of activations, and of their deviations from a centre that all parts share.
    Grid: ceil(C / BLOCK_C)^2, of which programs below the diagonal do nothing. A program adds
    BLOCK_T parts of matrices at a time, and BLOCK_S of sums.
    """
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    upper = tl.program_id(0) // BLOCKS
    column = tl.program_id(0) % BLOCKS
    if upper <= column:
        count = tl.zeros((1, BLOCK_C), tl.float64) + pixels
        n = (upper * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        m = (column * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        inside_n = n < CHANNELS
        inside_m = m < CHANNELS
        of_n = add_parts(sums_ptr + CHANNELS + n, parts, 2 * CHANNELS, inside_n, BLOCK_S, BLOCK_C)
        of_m = add_parts(sums_ptr + CHANNELS + m, parts, 2 * CHANNELS, inside_m, BLOCK_S, BLOCK_C)
        row = tl.trans(n)
        real = tl.trans(inside_n) & inside_m
        at = row * CHANNELS + m
        t = tl.arange(0, BLOCK_T)[:, None, None]
        total = tl.zeros((BLOCK_T, BLOCK_C, BLOCK_C), tl.float64)
        for start in range(0, parts, BLOCK_T):
            part = (start + t).to(tl.int64)
            value = tl.load(
                partial_ptr + part * (CHANNELS * CHANNELS) + at[None, :, :],
                mask=(part < parts) & real[None, :, :],
                other=0.0,
            )
            total += value.to(tl.float64)
        # What is left of the mean beside the centre.
        scatter = tl.sum(total, 0) - tl.trans(of_n) * (of_m / count)
        scatter = scatter.to(tl.float32)
        tl.store(scatter_ptr + at, scatter, mask=real & (row <= m))
        tl.store(scatter_ptr + m * CHANNELS + row, scatter, mask=real & (row < m))
        if upper == column:
            of_all = add_parts(sums_ptr + n, parts, 2 * CHANNELS, inside_n, BLOCK_S, BLOCK_C)
            tl.store(mean_ptr + n, (of_all / count).to(tl.float32), mask=inside_n)


@triton.jit
def load_block(
    matrix_ptr,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Elements `[rows, columns]` of a matrix `[ROWS, COLUMNS]` in float32, 0 outside."""
    real = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    at = matrix_ptr + row[:, None] * COLUMNS + column[None, :]
    return tl.load(at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def row_product(
    total,
    left,
    right,
):
    """Add `sum left right` over the columns of `[rows, columns]` to `total [rows]`."""
    return total + tl.sum(left.to(tl.float64) * right.to(tl.float64), 1)


@triton.jit(do_not_specialize=["epsilon", "share", "pixels"])
def product_statistics(
    spread_ptr,
    statistics_ptr,
    map_ptr,
    moments_ptr,
    weight_ptr,
    mean_ptr,
    scatter_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    epsilon,
    share,
    pixels,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`statistics [3, O]`: count, sum and M2 of `W a`; and `spread = W S`, `[O, I]`.

    Without `statistics` it is what BatchNorm makes of them, as `batch_norm` does: `map [2, O]` and
    `moments [4, O]`. `weight [O, I]`, `mean [I]`, `scatter [I, I]`. Grid: ceil(O / BLOCK_O).
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O,), tl.float64)
    squares = tl.zeros((BLOCK_O,), tl.float64)
    for start in range(0, INPUTS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        spread = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
        for first in range(0, INPUTS, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            weight = load_block(weight_ptr, o, k, OUTPUTS, INPUTS)
            scatter = load_block(scatter_ptr, k, n, INPUTS, INPUTS)
            spread = dot(weight, scatter, spread, PRECISION)
        real = (o < OUTPUTS)[:, None] & (n < INPUTS)[None, :]
        tl.store(spread_ptr + o[:, None] * INPUTS + n[None, :], spread, mask=real)
        weight = load_block(weight_ptr, o, n, OUTPUTS, INPUTS)
        squares = row_product(squares, spread, weight)
        mean = tl.load(mean_ptr + n, mask=n < INPUTS, other=0.0)
        total = row_product(total, weight, mean[None, :])
    count = tl.zeros((BLOCK_O,), tl.float64) + pixels
    # The scatter is positive semidefinite; rounding must not make a sum of squares negative.
    squares = tl.where(squares < 0, 0.0, squares)
    inside = o < OUTPUTS
    if statistics_ptr is None:
        store_map(
            map_ptr,
            moments_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            running_mean_ptr,
            running_var_ptr,
            counter_ptr,
            epsilon,
            share,
            count,
            total,
            squares,
            o,
            inside,
            OUTPUTS,
        )
    else:
        tl.store(statistics_ptr + o, count.to(tl.float32), mask=inside)
        tl.store(statistics_ptr + OUTPUTS + o, (count * total).to(tl.float32), mask=inside)
        tl.store(statistics_ptr + 2 * OUTPUTS + o, squares.to(tl.float32), mask=inside)


@triton.jit
def map_gradients(
    sums_ptr,
    of_bias_ptr,
    of_product_ptr,
    weight_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`sums [2, O]`: the gradients of the bias and of the scale behind the product.

    That of the bias is `of_bias [O]`; that of the scale the sums of `W P`, for `of_product`, P, and
    `weight`, `[O, I]`. Grid: ceil(O / BLOCK_O).
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    of_scale = tl.zeros((BLOCK_O,), tl.float64)
    for start in range(0, INPUTS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        weight = load_block(weight_ptr, o, n, OUTPUTS, INPUTS)
        of_scale = row_product(of_scale, load_block(of_product_ptr, o, n, OUTPUTS, INPUTS), weight)
    inside = o < OUTPUTS
    tl.store(sums_ptr + o, tl.load(of_bias_ptr + o, mask=inside, other=0.0), mask=inside)
    tl.store(sums_ptr + OUTPUTS + o, of_scale.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def weight_gradients(
    gradient_ptr,
    scaled_ptr,
    of_norm_ptr,
    of_product_ptr,
    weight_ptr,
    spread_ptr,
    mean_ptr,
    of_bias_ptr,
    map_ptr,
    moments_ptr,
    gain_ptr,
    curve_ptr,
    level_ptr,
    pixels,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of the weight for `gain grad + curve W a + level`, and `scaled = gain W`.

    The gradient is `gain P + curve (W S + n W m m^T) + n level m^T`, rounded once. Matrices
    `[O, I]`, P `of_product`; `mean [I]`; `gain`, `curve`, `level [O]`. Without these the statistics
    are those of this process alone, and BatchNorm's gradients, `of_norm [4, O]`, are made here from
    that of its map's bias, `of_bias [O]`, with `map` and `moments` as of `batch_norm_backward`.
    Grid: ceil(O / BLOCK_O).
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < OUTPUTS
    # Over the columns: of the mean of the product, or of the gradient of the map's scale.
    total = tl.zeros((BLOCK_O,), tl.float64)
    for start in range(0, INPUTS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        weight = load_block(weight_ptr, o, n, OUTPUTS, INPUTS)
        if of_norm_ptr is None:
            mean = tl.load(mean_ptr + n, mask=n < INPUTS, other=0.0)
            total = row_product(total, weight, mean[None, :])
        else:
            total = row_product(total, load_block(of_product_ptr, o, n, OUTPUTS, INPUTS), weight)
    if of_norm_ptr is None:
        gain = tl.load(gain_ptr + o, mask=inside, other=0.0)
        curve = tl.load(curve_ptr + o, mask=inside, other=0.0)
        level = tl.load(level_ptr + o, mask=inside, other=0.0)
        # Of the sum alone: the level is what remains of it where the curve meets the product.
        of_sum = (level + curve.to(tl.float64) * total) * pixels
    else:
        of_bias = tl.load(of_bias_ptr + o, mask=inside, other=0.0).to(tl.float64)
        curve, _ = store_gradients(
            of_norm_ptr, of_bias, total, map_ptr, moments_ptr, o, inside, OUTPUTS
        )
        curve = curve.to(tl.float32)
        gain = tl.load(map_ptr + OUTPUTS + o, mask=inside, other=0.0)
        # BatchNorm takes the mean of a gradient away.
        of_sum = -gain.to(tl.float64) * of_bias
    for start in range(0, INPUTS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mean = tl.load(mean_ptr + n, mask=n < INPUTS, other=0.0)
        weight = load_block(weight_ptr, o, n, OUTPUTS, INPUTS)
        gradient = gain[:, None] * load_block(of_product_ptr, o, n, OUTPUTS, INPUTS)
        gradient += curve[:, None] * load_block(spread_ptr, o, n, OUTPUTS, INPUTS)
        gradient += (of_sum[:, None] * mean[None, :]).to(tl.float32)
        real = inside[:, None] & (n < INPUTS)[None, :]
        at = o[:, None] * INPUTS + n[None, :]
        gradient = round_to(gradient, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + at, gradient, mask=real)
        scaled = round_to(gain[:, None] * weight, scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + at, scaled, mask=real)


@triton.jit
def moments_gradients(
    square_ptr,
    shift_ptr,
    weight_ptr,
    curve_ptr,
    level_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Q = W^T curve W`, `square [I, I]`, and `t = W^T level`, `shift [I]`.

    `weight [O, I]`, `curve` and `level [O]`. Grid: ceil(I / BLOCK_N)^2.
    """
    BLOCKS: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    column = tl.program_id(0) % BLOCKS
    n = tl.program_id(0) // BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    m = column * BLOCK_N + tl.arange(0, BLOCK_N)
    square = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, OUTPUTS, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        curve = tl.load(curve_ptr + o, mask=o < OUTPUTS, other=0.0)
        level = tl.load(level_ptr + o, mask=o < OUTPUTS, other=0.0)
        left = tl.trans(load_block(weight_ptr, o, n, OUTPUTS, INPUTS))
        right = curve[:, None] * load_block(weight_ptr, o, m, OUTPUTS, INPUTS)
        square = dot(left, right, square, PRECISION)
        shift = row_product(shift, left, level[None, :])
    real = (n < INPUTS)[:, None] & (m < INPUTS)[None, :]
    at = square_ptr + n[:, None] * INPUTS + m[None, :]
    tl.store(at, round_to(square, square_ptr.dtype.element_ty), mask=real)
    if column == 0:
        tl.store(shift_ptr + n, shift.to(tl.float32), mask=n < INPUTS)


hash_in_order(globals())
