"""Triton: the branch sum (12) as one matrix product, fused with what stands before and behind it.

A tile holds SAMPLES samples of BLOCK_P pixels each, so that masks and sums of a sample are rows and
columns of it. Letters, layouts and masks as in kernels/coded/energy.py; CHANNELS_OUT is C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import (
    activate,
    bounded,
    dot,
    hash_in_order,
    infinite_if_negative,
    load_affine,
    round_to,
)


@triton.jit
def branch_mask(mask_ptr, sample, k, batch, BRANCHES: tl.constexpr, WIDTH: tl.constexpr):
    """A mask `[B, N]` for channels `k` of samples: `[samples, 1, channels]`, 0 outside."""
    branch = k // WIDTH
    at = sample[:, None] * BRANCHES + branch[None, :]
    inside = (sample < batch)[:, None] & (branch < BRANCHES)[None, :]
    return tl.load(mask_ptr + at, mask=inside, other=0.0)[:, None, :]


@triton.jit(do_not_specialize=["batch"])
def expand_forward(
    y_ptr,
    sums_ptr,
    energy_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    form_ptr,
    drop_ptr,
    keep_ptr,
    factor_ptr,
    batch,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = factor sum_n drop keep W_n h_n`, with sums of `y` and `y^2` and energies on the way.

    Grid: (blocks of C * blocks of pixels * B / SAMPLES,), the first fastest. `y [B, PIXELS, C]` and
    `weight [C, N*D]` in the dtype of `z`. Each of the following may be None: `factor [B]`; `sums
    [pixel blocks, 2, B, C]`, of `y` before `factor` and before rounding; `energy [pixel blocks, B,
    N]`, the parts of `C P E`, after `keep` and before `drop`; all float32.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    BLOCKS: tl.constexpr = (PIXELS + BLOCK_P - 1) // BLOCK_P
    COLUMNS: tl.constexpr = (CHANNELS_OUT + BLOCK_C - 1) // BLOCK_C
    ROWS: tl.constexpr = SAMPLES * BLOCK_P
    column = tl.program_id(0) % COLUMNS
    block = tl.program_id(0) // COLUMNS % BLOCKS
    first = tl.program_id(0) // (COLUMNS * BLOCKS) * SAMPLES
    sample = first + tl.arange(0, SAMPLES)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    real = (sample < batch)[:, None, None] & (pixel < PIXELS)[None, :, None]
    row = sample.to(tl.int64)[:, None, None] * PIXELS + pixel[None, :, None]
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    product = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if CHANNELS % BLOCK_K == 0:
            z = tl.load(z_ptr + row * CHANNELS + k[None, None, :], mask=real, other=0.0)
        else:
            mask = real & (k < CHANNELS)[None, None, :]
            z = tl.load(z_ptr + row * CHANNELS + k[None, None, :], mask=mask, other=0.0)
        scale, bias = load_affine(scale_ptr, bias_ptr, k[None, :], (k < CHANNELS)[None, :])
        h = activate(z, scale, bias, real, AFFINE, True)
        if keep_ptr is not None:
            keep = branch_mask(keep_ptr, sample, k, batch, BRANCHES, WIDTH)
            h = round_to(h.to(tl.float32) * keep, z.dtype)
        if energy_ptr is not None:
            if column == 0:
                # The energy is the quadratic form of each pixel, summed. The form keeps twice the
                # digits of the activations' dtype, so that rounding it costs the energy nothing.
                lane = tl.arange(0, BLOCK_K)
                same = lane[:, None] // WIDTH == lane[None, :] // WIDTH
                at = k[:, None] * WIDTH + (lane % WIDTH)[None, :]
                form = tl.load(form_ptr + at, mask=same & (k < CHANNELS)[:, None], other=0.0)
                high = round_to(form, z.dtype)
                low = round_to(form - high.to(tl.float32), z.dtype)
                flat = tl.reshape(h, (ROWS, BLOCK_K))
                # A NaN or an infinity must not reach other branches through zeros of the form.
                operand = bounded(flat, not AFFINE) if BLOCK_K > WIDTH else flat
                image = dot(operand, high, tl.zeros((ROWS, BLOCK_K), tl.float32), PRECISION)
                image = dot(operand, low, image, PRECISION)
                parts = tl.reshape(image * flat.to(tl.float32), (SAMPLES, BLOCK_P, BLOCK_K))
                energy = tl.reshape(tl.sum(parts, 1), (SAMPLES, BLOCK_K // WIDTH, WIDTH))
                branch = start // WIDTH + tl.arange(0, BLOCK_K // WIDTH)
                place = (block * batch + sample)[:, None] * BRANCHES + branch[None, :]
                exists = (sample < batch)[:, None] & (branch < BRANCHES)[None, :]
                total = infinite_if_negative(tl.sum(energy, 2))
                tl.store(energy_ptr + place, total, mask=exists)
        if drop_ptr is not None:
            drop = branch_mask(drop_ptr, sample, k, batch, BRANCHES, WIDTH)
            h = round_to(h.to(tl.float32) * drop, z.dtype)
        inside = (c < CHANNELS_OUT)[:, None] & (k < CHANNELS)[None, :]
        if CHANNELS % BLOCK_K == 0 and CHANNELS_OUT % BLOCK_C == 0:
            weight = tl.load(weight_ptr + c[:, None] * CHANNELS + k[None, :])
        else:
            weight = tl.load(weight_ptr + c[:, None] * CHANNELS + k[None, :], inside, other=0.0)
        product = dot(tl.reshape(h, (ROWS, BLOCK_K)), tl.trans(weight), product, PRECISION)

    y = tl.reshape(product, (SAMPLES, BLOCK_P, BLOCK_C))
    stored = (sample < batch)[:, None] & (c < CHANNELS_OUT)[None, :]
    if sums_ptr is not None:
        # Rows that are not real are 0.
        place = (block * 2 * batch + sample)[:, None].to(tl.int64) * CHANNELS_OUT + c[None, :]
        tl.store(sums_ptr + place, tl.sum(y, 1), mask=stored)
        second = place + batch.to(tl.int64) * CHANNELS_OUT
        tl.store(sums_ptr + second, tl.sum(y * y, 1), mask=stored)
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + sample, mask=sample < batch, other=0.0)[:, None, None]
    tl.store(
        y_ptr + row * CHANNELS_OUT + c[None, None, :],
        round_to(y, y_ptr.dtype.element_ty),
        mask=real & (c < CHANNELS_OUT)[None, None, :],
    )


hash_in_order(globals())
