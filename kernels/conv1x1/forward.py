"""Triton: the 1x1 convolution, forward, with what stands before it on the way in and the partial
statistics of the next BatchNorm on the way out.

Tiles as in kernels/conv1x1/tiles.py. A weight that fits into one block of BLOCK_K input channels
stays with a program for all its tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import dot, hash_in_order, round_to

from .tiles import (
    add_moments,
    add_product,
    join,
    load_tile,
    load_vector,
    load_weight,
    pack_bits,
    resident_operands,
    store_tile,
    store_vectors,
)


@triton.jit(do_not_specialize=["rows"])
def product_forward(
    y_ptr,
    partial_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = W relu(scale x + bias)`.

    Grid: parts * ceil(OUTPUTS / BLOCK_N). `y [rows, OUTPUTS]`, `x [rows, INPUTS]`; `scale`, `bias
    [INPUTS]` float32 or None; `weight [OUTPUTS, INPUTS]` in the dtype of `x`; `partial
    [parts, 3, OUTPUTS]` float32 or None.
    """
    STATISTICS: tl.constexpr = partial_ptr is not None
    COLUMNS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    WHOLE_N: tl.constexpr = OUTPUTS % BLOCK_N == 0
    part = tl.program_id(0) // COLUMNS
    n = (tl.program_id(0) % COLUMNS) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    resident = resident_operands(
        scale_ptr, bias_ptr, weight_ptr, n, INPUTS, OUTPUTS, BLOCK_K, WHOLE_N
    )
    zero = tl.zeros((BLOCK_N,), tl.float32)
    moments = (0.0, zero, zero)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0) // COLUMNS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_M
        left = tl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        real = (m < left)[:, None]
        acc = add_product(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
            x_ptr,
            scale_ptr,
            bias_ptr,
            weight_ptr,
            resident,
            first,
            m,
            n,
            real,
            INPUTS,
            OUTPUTS,
            BLOCK_K,
            BLOCK_N,
            PRECISION,
        )
        y = y_ptr + first * OUTPUTS + m[:, None] * OUTPUTS + n[None, :]
        store_tile(y, tl.trans(round_to(acc, y_ptr.dtype.element_ty)), real, n < OUTPUTS, WHOLE_N)
        if STATISTICS:
            moments = add_moments(moments, acc, left)
    if STATISTICS:
        vectors = (tl.broadcast_to(moments[0], (BLOCK_N,)), moments[1], moments[2])
        store_vectors(partial_ptr, part, n, n < OUTPUTS, vectors, OUTPUTS)


@triton.jit(do_not_specialize=["rows"])
def join_forward(
    x_ptr,
    signs_ptr,
    z_ptr,
    partial_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_bias_ptr,
    weight_ptr,
    rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x = relu(scale y + bias + residual)`, `z = W x`; the first column of tiles writes `x`.

    Grid, `weight` and `partial` as for `product_forward`. `x`, `y`, `residual [rows, INPUTS]`, `z
    [rows, OUTPUTS]`; `signs [rows, INPUTS / 8]` bytes or None; the vectors `[INPUTS]` float32,
    those of the residual or None.
    """
    MAPPED: tl.constexpr = residual_scale_ptr is not None
    STATISTICS: tl.constexpr = partial_ptr is not None
    COLUMNS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    RESIDENT: tl.constexpr = INPUTS <= BLOCK_K
    WHOLE_K: tl.constexpr = INPUTS % BLOCK_K == 0
    WHOLE_N: tl.constexpr = OUTPUTS % BLOCK_N == 0
    part = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    if RESIDENT:
        weight = load_weight(weight_ptr, n, k, INPUTS, OUTPUTS, WHOLE_K and WHOLE_N)
        scale = load_vector(scale_ptr, k, k < INPUTS, 0.0, WHOLE_K)
        bias = load_vector(bias_ptr, k, k < INPUTS, 0.0, WHOLE_K)
        residual_scale = load_vector(residual_scale_ptr, k, k < INPUTS, 0.0, WHOLE_K)
        residual_bias = load_vector(residual_bias_ptr, k, k < INPUTS, 0.0, WHOLE_K)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    moments = (0.0, zero, zero)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0) // COLUMNS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_M
        left = tl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        real = (m < left)[:, None]
        writes = real if COLUMNS == 1 else (m < left - column * BLOCK_M)[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            kk = start + k
            if not RESIDENT:
                weight = load_weight(weight_ptr, n, kk, INPUTS, OUTPUTS, WHOLE_K and WHOLE_N)
                scale = load_vector(scale_ptr, kk, kk < INPUTS, 0.0, WHOLE_K)
                bias = load_vector(bias_ptr, kk, kk < INPUTS, 0.0, WHOLE_K)
                residual_scale = load_vector(residual_scale_ptr, kk, kk < INPUTS, 0.0, WHOLE_K)
                residual_bias = load_vector(residual_bias_ptr, kk, kk < INPUTS, 0.0, WHOLE_K)
            at = first * INPUTS + m[:, None] * INPUTS + kk[None, :]
            y = load_tile(y_ptr + at, real, kk < INPUTS, WHOLE_K)
            residual = load_tile(residual_ptr + at, real, kk < INPUTS, WHOLE_K)
            x = join(y, residual, scale, bias, residual_scale, residual_bias, real, MAPPED)
            store_tile(x_ptr + at, x, writes, kk < INPUTS, WHOLE_K)
            if signs_ptr is not None:
                byte = start // 8 + tl.arange(0, BLOCK_K // 8)
                at = first * (INPUTS // 8) + m[:, None] * (INPUTS // 8) + byte[None, :]
                signs = pack_bits(x, BLOCK_M, BLOCK_K)
                store_tile(signs_ptr + at, signs, writes, byte < INPUTS // 8, WHOLE_K)
            acc = dot(weight, tl.trans(x), acc, PRECISION)
        z = z_ptr + first * OUTPUTS + m[:, None] * OUTPUTS + n[None, :]
        store_tile(z, tl.trans(round_to(acc, z_ptr.dtype.element_ty)), real, n < OUTPUTS, WHOLE_N)
        if STATISTICS:
            moments = add_moments(moments, acc, left)
    if STATISTICS:
        vectors = (tl.broadcast_to(moments[0], (BLOCK_N,)), moments[1], moments[2])
        store_vectors(partial_ptr, part, n, n < OUTPUTS, vectors, OUTPUTS)


hash_in_order(globals())
