"""Triton: the gradient of the 1x1 convolution with respect to its weight, with what stands before
the convolution on the way in; the first of two stages.

Every program sums its share of the pixels into one block of the weight; the launch adds the shares
in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv1x1_tiles import load_tile, load_vector
from .tile import activate, dot, hash_in_order


@triton.jit(do_not_specialize=["rows"])
def product_weight_gradient(
    partial_ptr,
    grad_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of `grad^T relu(scale x + bias)` over tiles of BLOCK_K rows.

    Grid: shares * blocks of the weight. `partial [shares, OUTPUTS, INPUTS]` float32, `grad
    [rows, OUTPUTS]`, `x [rows, INPUTS]`; `scale`, `bias [INPUTS]` float32 or None. A block is
    BLOCK_M output by BLOCK_N input channels.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    COLUMNS: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = COLUMNS * ((OUTPUTS + BLOCK_M - 1) // BLOCK_M)
    WHOLE_M: tl.constexpr = OUTPUTS % BLOCK_M == 0
    WHOLE_N: tl.constexpr = INPUTS % BLOCK_N == 0
    share = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    m = (block // COLUMNS) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block % COLUMNS) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    scale = load_vector(scale_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    bias = load_vector(bias_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(share, tl.cdiv(rows, BLOCK_K), tl.num_programs(0) // BLOCKS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_K
        real = (k < rows - tile * BLOCK_K)[:, None]
        at = first * OUTPUTS + k[:, None] * OUTPUTS + m[None, :]
        grad = load_tile(grad_ptr + at, real, m < OUTPUTS, WHOLE_M)
        at = first * INPUTS + k[:, None] * INPUTS + n[None, :]
        x = load_tile(x_ptr + at, real, n < INPUTS, WHOLE_N)
        # Rows that are not real are 0 in the gradient, which is enough: activations are finite.
        x = activate(x, scale, bias, real, AFFINE, False)
        acc = dot(tl.trans(grad), x, acc, PRECISION)
    out = partial_ptr + share.to(tl.int64) * (OUTPUTS * INPUTS)
    out += m[:, None] * INPUTS + n[None, :]
    tl.store(out, acc, mask=(m < OUTPUTS)[:, None] & (n < INPUTS)[None, :])


hash_in_order(globals())
