"""Triton: the gradient that reaches the input of a 1x1 convolution whose BatchNorm took its
statistics from the moments of what was multiplied; so the output need not be there.

That gradient is `V^T grad + Q h + t`, with `h` what was multiplied: the statistics' share of it is
linear in `h`. Tiles as in conv1x1_tiles.py, the end of a tile as in conv1x1_backward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv1x1_backward import finish_input_gradient, gradient_product, resident_weight
from .conv1x1_tiles import (
    add_product,
    load_vector,
    resident_operands,
    store_tile,
    store_vectors,
)
from .tile import hash_in_order, round_to


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
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dx = scale (V^T grad + size Q relu(scale x + bias) + t)` where `scale x + bias > 0`; without
    scale and bias `V^T grad + size Q x + t`.

    Grid: parts * ceil(INPUTS / BLOCK_N). `dx`, `x [rows, INPUTS]`, `grad [rows, OUTPUTS]`; V is
    `weight [OUTPUTS, INPUTS]`, Q the symmetric `square [INPUTS, INPUTS]`; float32: `size` is one
    number, t is `shift [INPUTS]`, as are `scale` and `bias` or None, and with them `partial [parts,
    2, INPUTS]`, the gradients of bias and scale. The first product takes BLOCK_K output channels a
    step, the second BLOCK_H of the input's.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    COLUMNS: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    WHOLE_N: tl.constexpr = INPUTS % BLOCK_N == 0
    WIDTH: tl.constexpr = BLOCK_N // CHUNKS
    part = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    size = tl.load(size_ptr)
    shift = load_vector(shift_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    of_output = resident_weight(None, None, None, weight_ptr, n, INPUTS, OUTPUTS, BLOCK_K, WHOLE_N)
    of_input = resident_operands(
        scale_ptr, bias_ptr, square_ptr, n, INPUTS, INPUTS, BLOCK_H, WHOLE_N
    )
    of_bias = tl.zeros((CHUNKS, WIDTH), tl.float32)
    of_scale = tl.zeros((CHUNKS, WIDTH), tl.float32)
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
        at = first * INPUTS + m[:, None] * INPUTS
        d = round_to(d + shift, dx_ptr.dtype.element_ty)
        store_tile(dx_ptr + at + n[None, :], d, real, n < INPUTS, WHOLE_N)
        if AFFINE:
            of_bias, of_scale = finish_input_gradient(
                dx_ptr + at,
                x_ptr + at,
                scale_ptr,
                bias_ptr,
                of_bias,
                of_scale,
                column,
                real,
                INPUTS,
                BLOCK_N,
                CHUNKS,
            )
    if AFFINE:
        sums = (tl.reshape(of_bias, (BLOCK_N,)), tl.reshape(of_scale, (BLOCK_N,)))
        store_vectors(partial_ptr, part, n, n < INPUTS, sums, INPUTS)


hash_in_order(globals())
