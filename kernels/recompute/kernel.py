"""Triton: the 1x1 convolution at the end of a residual block, with all that stands behind it on the
way out: its factors and its bias, the residual, and the ReLU. What it multiplies is never stored
with BatchNorm applied, and its product is not stored at all.

Tiles as in kernels/conv1x1/tiles.py; weights stay with a program as in kernels/conv1x1/forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.conv1x1.tiles import (
    add_product,
    add_residual,
    load_tile,
    load_vector,
    pack_bits,
    resident_operands,
    store_tile,
)
from coded_resnext.kernels.tile import hash_in_order, rectify_real


@triton.jit(do_not_specialize=["rows", "pixels"])
def product_join(
    y_ptr,
    signs_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    out_scale_ptr,
    out_bias_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_bias_ptr,
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
    """`y = relu(factor out_scale W relu(scale x + bias) + out_bias + residual)`.

    Grid: parts * ceil(OUTPUTS / BLOCK_N). `y`, `residual [rows, OUTPUTS]`, `x [rows, INPUTS]` and
    `weight [OUTPUTS, INPUTS]` in one dtype; `signs [rows, OUTPUTS / 8]` bytes; float32: `scale`,
    `bias [INPUTS]`, the other vectors `[OUTPUTS]`, and `factor [rows / pixels]`, one number a
    sample. All but `y`, `x`, `weight` and `out_bias` may be None, the vectors `scale` and `bias`,
    and those of the residual, together.
    """
    COLUMNS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    WHOLE_N: tl.constexpr = OUTPUTS % BLOCK_N == 0
    MAPPED: tl.constexpr = residual_scale_ptr is not None
    part = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    out_scale = load_vector(out_scale_ptr, n, n < OUTPUTS, 1.0, WHOLE_N)
    out_bias = load_vector(out_bias_ptr, n, n < OUTPUTS, 0.0, WHOLE_N)
    residual_scale = load_vector(residual_scale_ptr, n, n < OUTPUTS, 1.0, WHOLE_N)
    residual_bias = load_vector(residual_bias_ptr, n, n < OUTPUTS, 0.0, WHOLE_N)
    resident = resident_operands(
        scale_ptr, bias_ptr, weight_ptr, n, INPUTS, OUTPUTS, BLOCK_K, WHOLE_N
    )
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
        h = tl.trans(acc)
        if factor_ptr is not None:
            sample = (tile * BLOCK_M + m) // pixels
            h *= tl.load(factor_ptr + sample, mask=m < left, other=0.0)[:, None]
        if out_scale_ptr is not None:
            h *= out_scale
        h += out_bias
        at = first * OUTPUTS + m[:, None] * OUTPUTS + n[None, :]
        if residual_ptr is not None:
            residual = load_tile(residual_ptr + at, real, n < OUTPUTS, WHOLE_N)
            h = add_residual(h, residual, residual_scale, residual_bias, MAPPED)
        y = rectify_real(h, real, y_ptr.dtype.element_ty, False)
        store_tile(y_ptr + at, y, real, n < OUTPUTS, WHOLE_N)
        if signs_ptr is not None:
            byte = column * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            at = first * (OUTPUTS // 8) + m[:, None] * (OUTPUTS // 8) + byte[None, :]
            signs = pack_bits(y, BLOCK_M, BLOCK_N)
            store_tile(signs_ptr + at, signs, real, byte < OUTPUTS // 8, WHOLE_N)


hash_in_order(globals())
