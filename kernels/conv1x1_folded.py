"""Triton: the 1x1 convolution in evaluation, with all that stands behind it on the way out.

Tiles as in conv1x1_tiles.py; weights stay with a program as in conv1x1_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv1x1_tiles import load_tile, load_vector, load_weight, store_tile
from .tile import dot, hash_in_order, rectify_real


@triton.jit(do_not_specialize=["rows", "pixels"])
def product_folded(
    y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    factor_ptr,
    rows,
    pixels,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = relu(factor W x + bias + residual)`.

    Grid: parts * ceil(OUTPUTS / BLOCK_N). `y`, `residual [rows, OUTPUTS]`, `x [rows, INPUTS]` and
    `weight [OUTPUTS, INPUTS]` in one dtype; `bias [OUTPUTS]` and `factor [rows / pixels]`, one
    number a sample, float32. `residual` and `factor` may be None.
    """
    COLUMNS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    RESIDENT: tl.constexpr = INPUTS <= BLOCK_K
    WHOLE_K: tl.constexpr = INPUTS % BLOCK_K == 0
    WHOLE_N: tl.constexpr = OUTPUTS % BLOCK_N == 0
    part = tl.program_id(0) // COLUMNS
    n = (tl.program_id(0) % COLUMNS) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    bias = load_vector(bias_ptr, n, n < OUTPUTS, 0.0, WHOLE_N)
    if RESIDENT:
        weight = load_weight(weight_ptr, n, k, INPUTS, OUTPUTS, WHOLE_K and WHOLE_N)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0) // COLUMNS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_M
        left = tl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        real = (m < left)[:, None]
        x = x_ptr + first * INPUTS + m[:, None] * INPUTS
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            kk = start + k
            if not RESIDENT:
                weight = load_weight(weight_ptr, n, kk, INPUTS, OUTPUTS, WHOLE_K and WHOLE_N)
            a = load_tile(x + kk[None, :], real, kk < INPUTS, WHOLE_K)
            acc = dot(weight, tl.trans(a), acc, PRECISION)
        h = tl.trans(acc)
        if factor_ptr is not None:
            sample = (tile * BLOCK_M + m) // pixels
            h *= tl.load(factor_ptr + sample, mask=m < left, other=0.0)[:, None]
        h += bias
        at = first * OUTPUTS + m[:, None] * OUTPUTS + n[None, :]
        if residual_ptr is not None:
            h += load_tile(residual_ptr + at, real, n < OUTPUTS, WHOLE_N).to(tl.float32)
        y = rectify_real(h, real, y_ptr.dtype.element_ty, False)
        store_tile(y_ptr + at, y, real, n < OUTPUTS, WHOLE_N)


hash_in_order(globals())
