"""Triton: the gradient of the 1x1 convolution with respect to its input, with the backward pass of
the BatchNorm behind it on the way in, and what stands before it on the way out.

Tiles as in kernels/conv1x1/tiles.py. The product is over the output channels. Its tile is rounded
before the threads exchange it, so that what follows has the layout of wide loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import activate, dot, hash_in_order, round_to

from .tiles import (
    add_rows,
    add_statistics_gradient,
    column_sums,
    load_tile,
    load_vector,
    load_weight,
    store_tile,
    store_vectors,
    unpack_bits,
)


@triton.jit
def gradient_product(
    acc,
    output_gradient_ptr,
    grad_ptr,
    y_ptr,
    gain_ptr,
    curve_ptr,
    level_ptr,
    weight_ptr,
    resident,
    first,
    m,
    n,
    real,
    writes,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of `W^T d` to `acc [BLOCK_N, BLOCK_M]`, with `d = gain grad + curve y + level`
    written on the way; `[BLOCK_M, BLOCK_N]`.

    `resident` are the weight and the three vectors where they are the same for all tiles.
    """
    WHOLE_K: tl.constexpr = OUTPUTS % BLOCK_K == 0
    WHOLE: tl.constexpr = WHOLE_K and INPUTS % BLOCK_N == 0
    RESIDENT: tl.constexpr = OUTPUTS <= BLOCK_K
    GAIN: tl.constexpr = gain_ptr is not None
    WITH_Y: tl.constexpr = y_ptr is not None
    for start in range(0, OUTPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < OUTPUTS
        if RESIDENT:
            weight, gain, curve, level = resident
        else:
            weight = load_weight(weight_ptr, k, n, INPUTS, OUTPUTS, WHOLE)
            gain = load_vector(gain_ptr, k, inside, 0.0, WHOLE_K)
            curve = load_vector(curve_ptr, k, inside, 0.0, WHOLE_K)
            level = load_vector(level_ptr, k, inside, 0.0, WHOLE_K)
        at = first * OUTPUTS + m[:, None] * OUTPUTS + k[None, :]
        grad = load_tile(grad_ptr + at, real, inside, WHOLE_K)
        y = grad
        if WITH_Y:
            y = load_tile(y_ptr + at, real, inside, WHOLE_K)
        d = add_statistics_gradient(grad, y, gain, curve, level, GAIN, WITH_Y)
        if output_gradient_ptr is not None:
            store_tile(output_gradient_ptr + at, d, writes, inside, WHOLE_K)
        acc = dot(tl.trans(weight), tl.trans(d), acc, PRECISION)
    return tl.trans(acc)


@triton.jit
def resident_weight(
    gain_ptr,
    curve_ptr,
    level_ptr,
    weight_ptr,
    n,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
):
    """What `gradient_product` needs for all output channels at once; nothing if it takes steps."""
    WHOLE_K: tl.constexpr = OUTPUTS % BLOCK_K == 0
    if OUTPUTS > BLOCK_K:
        resident = (0.0, 0.0, 0.0, 0.0)
    else:
        k = tl.arange(0, BLOCK_K)
        resident = (
            load_weight(weight_ptr, k, n, INPUTS, OUTPUTS, WHOLE_K and WHOLE_N),
            load_vector(gain_ptr, k, k < OUTPUTS, 0.0, WHOLE_K),
            load_vector(curve_ptr, k, k < OUTPUTS, 0.0, WHOLE_K),
            load_vector(level_ptr, k, k < OUTPUTS, 0.0, WHOLE_K),
        )
    return resident


@triton.jit
def through_map(d, x, scale, bias, real, of_bias, of_scale):
    """The gradient before `relu(scale x + bias)` from `d` behind it; and its columns added to the
    sums for bias and scale."""
    x = x.to(tl.float32)
    d = tl.where((x * scale + bias > 0) & real, d.to(tl.float32), 0.0)
    return d * scale, add_rows(of_bias, d), add_rows(of_scale, d * x)


@triton.jit(do_not_specialize=["rows"])
def product_input_gradient(
    dx_ptr,
    output_gradient_ptr,
    partial_ptr,
    grad_ptr,
    y_ptr,
    gain_ptr,
    curve_ptr,
    level_ptr,
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
    """`dx = scale W^T d` where `scale x + bias > 0`, with `d = gain grad + curve y + level`.

    Grid: parts * ceil(INPUTS / BLOCK_N). `dx`, `x [rows, INPUTS]`, `grad`, `y`, `output_gradient
    [rows, OUTPUTS]`: `output_gradient` receives `d`; it and `y` may be None. `gain`, `curve`,
    `level [OUTPUTS]` float32 or None. `scale`, `bias [INPUTS]` float32 or None; with them `x` and
    `partial [parts, 2, INPUTS]` float32, the gradients of bias and scale. `weight` is `[OUTPUTS,
    INPUTS]`.
    """
    AFFINE: tl.constexpr = scale_ptr is not None
    COLUMNS: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    WHOLE_N: tl.constexpr = INPUTS % BLOCK_N == 0
    part = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    resident = resident_weight(
        gain_ptr, curve_ptr, level_ptr, weight_ptr, n, INPUTS, OUTPUTS, BLOCK_K, WHOLE_N
    )
    scale = load_vector(scale_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    bias = load_vector(bias_ptr, n, n < INPUTS, 0.0, WHOLE_N)
    of_bias = column_sums(BLOCK_M, BLOCK_N)
    of_scale = column_sums(BLOCK_M, BLOCK_N)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0) // COLUMNS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_M
        left = tl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        real = (m < left)[:, None]
        here = first * INPUTS + m[:, None] * INPUTS + n[None, :]
        # Asked for before the product.
        if AFFINE:
            x = load_tile(x_ptr + here, real, n < INPUTS, WHOLE_N)
        d = gradient_product(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
            output_gradient_ptr,
            grad_ptr,
            y_ptr,
            gain_ptr,
            curve_ptr,
            level_ptr,
            weight_ptr,
            resident,
            first,
            m,
            n,
            real,
            real if COLUMNS == 1 else (m < left - column * BLOCK_M)[:, None],
            INPUTS,
            OUTPUTS,
            BLOCK_K,
            BLOCK_N,
            PRECISION,
        )
        d = round_to(d, dx_ptr.dtype.element_ty)
        if AFFINE:
            d, of_bias, of_scale = through_map(d, x, scale, bias, real, of_bias, of_scale)
            d = round_to(d, dx_ptr.dtype.element_ty)
        store_tile(dx_ptr + here, d, real, n < INPUTS, WHOLE_N)
    if AFFINE:
        sums = (tl.sum(of_bias, 0), tl.sum(of_scale, 0))
        store_vectors(partial_ptr, part, n, n < INPUTS, sums, INPUTS)


@triton.jit(do_not_specialize=["rows"])
def join_input_gradient(
    g_ptr,
    output_gradient_ptr,
    partial_ptr,
    grad_ptr,
    z_ptr,
    gain_ptr,
    curve_ptr,
    level_ptr,
    grad_x_ptr,
    x_ptr,
    signs_ptr,
    y_ptr,
    residual_ptr,
    weight_ptr,
    rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`g = W^T d + grad_x` where `x > 0`, with `d = gain grad + curve z + level`.

    Grid and `output_gradient` as for `product_input_gradient`. `g`, `grad_x`, `x`, `y`, `residual
    [rows, INPUTS]`, `grad`, `z [rows, OUTPUTS]`; `grad_x`, `y`, `residual`, `z` may be None, and
    one of `x` and `signs [rows, INPUTS / 8]` is. `partial [parts, 1 to 3, INPUTS]` float32: the
    sums of `g`, of `g y` and of `g residual` where there are these.
    """
    RAW: tl.constexpr = y_ptr is not None
    MAPPED: tl.constexpr = residual_ptr is not None
    COLUMNS: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    WHOLE_N: tl.constexpr = INPUTS % BLOCK_N == 0
    BYTES: tl.constexpr = INPUTS // 8
    part = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    resident = resident_weight(
        gain_ptr, curve_ptr, level_ptr, weight_ptr, n, INPUTS, OUTPUTS, BLOCK_K, WHOLE_N
    )
    b = column * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    of_g = column_sums(BLOCK_M, BLOCK_N)
    of_y = column_sums(BLOCK_M, BLOCK_N)
    of_residual = column_sums(BLOCK_M, BLOCK_N)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0) // COLUMNS):
        first = tl.full((), 0, tl.int64) + tile * BLOCK_M
        left = tl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        real = (m < left)[:, None]
        here = first * INPUTS + m[:, None] * INPUTS + n[None, :]
        # What the end of the tile needs is asked for before the product.
        if grad_x_ptr is not None:
            grad_x = load_tile(grad_x_ptr + here, real, n < INPUTS, WHOLE_N)
        if signs_ptr is not None:
            bytes_at = first * BYTES + m[:, None] * BYTES + b[None, :]
            signs = load_tile(signs_ptr + bytes_at, real, b < BYTES, WHOLE_N)
        else:
            x = load_tile(x_ptr + here, real, n < INPUTS, WHOLE_N)
        if RAW:
            y = load_tile(y_ptr + here, real, n < INPUTS, WHOLE_N)
        if MAPPED:
            residual = load_tile(residual_ptr + here, real, n < INPUTS, WHOLE_N)
        g = gradient_product(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
            output_gradient_ptr,
            grad_ptr,
            z_ptr,
            gain_ptr,
            curve_ptr,
            level_ptr,
            weight_ptr,
            resident,
            first,
            m,
            n,
            real,
            real if COLUMNS == 1 else (m < left - column * BLOCK_M)[:, None],
            INPUTS,
            OUTPUTS,
            BLOCK_K,
            BLOCK_N,
            PRECISION,
        )
        # Rounded before it is exchanged between threads.
        g = round_to(g, g_ptr.dtype.element_ty).to(tl.float32)
        if grad_x_ptr is not None:
            g += grad_x.to(tl.float32)
        if signs_ptr is not None:
            g = tl.where(unpack_bits(signs, BLOCK_M, BLOCK_N) & real, g, 0.0)
        else:
            g = tl.where((x.to(tl.float32) > 0) & real, g, 0.0)
        store_tile(g_ptr + here, round_to(g, g_ptr.dtype.element_ty), real, n < INPUTS, WHOLE_N)
        of_g = add_rows(of_g, g)
        if RAW:
            of_y = add_rows(of_y, g * y.to(tl.float32))
        if MAPPED:
            of_residual = add_rows(of_residual, g * residual.to(tl.float32))
    sum_g = tl.sum(of_g, 0)
    sum_y = tl.sum(of_y, 0)
    sum_r = tl.sum(of_residual, 0)
    if RAW and MAPPED:
        store_vectors(partial_ptr, part, n, n < INPUTS, (sum_g, sum_y, sum_r), INPUTS)
    elif RAW:
        store_vectors(partial_ptr, part, n, n < INPUTS, (sum_g, sum_y), INPUTS)
    elif MAPPED:
        store_vectors(partial_ptr, part, n, n < INPUTS, (sum_g, sum_r), INPUTS)
    else:
        store_vectors(partial_ptr, part, n, n < INPUTS, (sum_g,), INPUTS)


hash_in_order(globals())


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
