"""Triton: the coded normalisation of a block, one program a sample.

Forward: energies (11), mean energy (3), and `s h` of (12); the branch sum behind it is a plain 1x1
convolution. Backward: (13)-(16) from the gradient of `s h`. A sample's activations are read twice
by its program, the second time from the cache. Letters, layouts and masks as in
kernels/coded/energy.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import (
    activate,
    form_entries,
    hash_in_order,
    load_affine,
    load_rows,
    matrix_entries,
    over_pixels,
    round_to,
    rounded_product,
    store_rows,
    window_channels,
)

from . import reference as coded_reference
from .energy import gradient_tile, store_sums, window_energy, window_gram, zeros

DEAD_ENERGY = tl.constexpr(coded_reference.DEAD_ENERGY)


@triton.jit
def load_masks(drop_ptr, keep_ptr, at, inside):
    """The product of the masks that are there, 1 where there is none and 0 outside."""
    factor = tl.where(inside, 1.0, 0.0)
    if drop_ptr is not None:
        factor *= tl.load(drop_ptr + at, mask=inside, other=0.0)
    if keep_ptr is not None:
        factor *= tl.load(keep_ptr + at, mask=inside, other=0.0)
    return factor


@triton.jit
def aggregate_forward(
    scaled_ptr,
    normalized_ptr,
    inverse_ptr,
    energy_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    form_ptr,
    drop_ptr,
    keep_ptr,
    inverse_size,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
    BRANCHES_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(3)-(5), (10)-(12): `scaled = s h`, `Ebar`, `1/M`.

    Grid: (B,). `scaled [B, PIXELS, N*D]` in the dtype of `z`; `normalized [B, N]` is `Ebar`,
    `inverse [B]` is `1/M`, or 0 for a dead sample, and `energy [B, N]` is `E`; float32.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    MATRIX: tl.constexpr = WINDOWS == 1 and BLOCK_K > 16
    FULL: tl.constexpr = GROUP * WIDTH == BLOCK_K and BRANCHES % (GROUP * WINDOWS) == 0
    sample = tl.program_id(0)
    base = sample.to(tl.int64) * (PIXELS * CHANNELS)
    for step in range(STEPS):
        windows, channel, inside = window_channels(step, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
        scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
        rows = z_ptr + base + over_pixels(channel, MATRIX)
        gram = window_gram(
            rows, inside, scale, bias, AFFINE, CHANNELS, PIXELS, BLOCK_P, FULL, PRECISION
        )
        entries, within = form_entries(windows, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
        form = tl.load(form_ptr + entries, mask=within, other=0.0)
        member = tl.arange(0, GROUP_P)
        branch = windows[:, None] * GROUP + member[None, :]
        real = (member < GROUP)[None, :] & (branch < BRANCHES)
        at = sample * BRANCHES + branch
        if MATRIX:
            gram = gram[None, :, :]
        energy = window_energy(gram, form, inverse_size, WIDTH, GROUP_P)
        energy *= load_masks(None, keep_ptr, at, real)
        tl.store(energy_ptr + at, energy, mask=real)

    # What other threads of the program have stored is read from here on.
    tl.debug_barrier()
    n = tl.arange(0, BRANCHES_P)
    energies = tl.load(energy_ptr + sample * BRANCHES + n, mask=n < BRANCHES, other=0.0)
    mean = tl.sum(energies, 0) / BRANCHES
    dead = mean <= DEAD_ENERGY
    inverse = tl.where(dead, 0.0, tl.div_rn(1.0, tl.where(dead, 1.0, mean)))
    tl.store(normalized_ptr + sample * BRANCHES + n, energies * inverse, mask=n < BRANCHES)
    tl.store(inverse_ptr + sample, inverse)
    root = tl.sqrt_rn(inverse)

    for step in range(STEPS):
        windows, channel, inside = window_channels(step, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
        scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
        at = sample * BRANCHES + channel // WIDTH
        factor = over_pixels(load_masks(drop_ptr, keep_ptr, at, inside) * root, MATRIX)
        offsets = base + over_pixels(channel, MATRIX)
        for start in range(0, PIXELS, BLOCK_P):
            z, real, pixel = load_rows(
                z_ptr + offsets, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL
            )
            h = activate(z, scale, bias, real, AFFINE, False).to(tl.float32)
            scaled = round_to(h * factor, z.dtype)
            store_rows(scaled_ptr + offsets + pixel, scaled, real, inside, PIXELS, BLOCK_P, FULL)


@triton.jit
def aggregate_backward(
    grad_ptr,
    sums_ptr,
    coefficient_ptr,
    upstream_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    form_ptr,
    drop_ptr,
    keep_ptr,
    normalized_ptr,
    inverse_ptr,
    grad_normalized_ptr,
    inverse_size,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
    BRANCHES_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(13)-(16): the gradient of `z` from those of `scaled` and `Ebar`.

    Grid: (B,). `grad` and `upstream`, the gradient of `scaled`, are `[B, PIXELS, N*D]` in the dtype
    of `z`. `coefficient [B, N]` becomes `2 dE / (C P)`, which (17) needs. With an affine map,
    `sums [B, 2, N*D]` are each sample's sums of the gradient behind the map, and of that times `z`.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    MATRIX: tl.constexpr = WINDOWS == 1 and BLOCK_K > 16
    FULL: tl.constexpr = GROUP * WIDTH == BLOCK_K and BRANCHES % (GROUP * WINDOWS) == 0
    MASKED: tl.constexpr = PIXELS % BLOCK_P != 0
    sample = tl.program_id(0)
    base = sample.to(tl.int64) * (PIXELS * CHANNELS)
    products = zeros(WINDOWS, BLOCK_P, BLOCK_K, MATRIX)
    for step in range(STEPS):
        windows, channel, inside = window_channels(step, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
        scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
        at = sample * BRANCHES + channel // WIDTH
        factor = over_pixels(load_masks(drop_ptr, keep_ptr, at, inside), MATRIX)
        offsets = base + over_pixels(channel, MATRIX)
        for start in range(0, PIXELS, BLOCK_P):
            z, real, pixel = load_rows(
                z_ptr + offsets, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL
            )
            upstream, real, pixel = load_rows(
                upstream_ptr + offsets, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL
            )
            # Rows that are not real have an upstream gradient of 0.
            h = activate(z, scale, bias, real, AFFINE, False).to(tl.float32)
            products += h * factor * upstream.to(tl.float32)
    inverse = tl.load(inverse_ptr + sample)
    root = tl.sqrt_rn(inverse)
    # (14): sum_n m ds / sqrt(M) is the inner product of s h with its gradient.
    if not MATRIX:
        products = tl.sum(products, 2)
    through_scale = root * tl.sum(tl.sum(products, 1), 0)

    n = tl.arange(0, BRANCHES_P)
    row = sample * BRANCHES + n
    exists = n < BRANCHES
    normalized = tl.load(normalized_ptr + row, mask=exists, other=0.0)
    grad_normalized = tl.load(grad_normalized_ptr + row, mask=exists, other=0.0)
    through_energies = tl.sum(rounded_product(grad_normalized, normalized), 0)
    grad_mean = -inverse * (0.5 * through_scale + through_energies)
    grad_energy = grad_normalized * inverse + grad_mean / BRANCHES
    grad_energy *= load_masks(None, keep_ptr, row, exists)
    tl.store(coefficient_ptr + row, grad_energy * (2.0 * inverse_size), mask=exists)
    # The coefficients are read by other threads of the program than have stored them.
    tl.debug_barrier()

    for step in range(STEPS):
        windows, channel, inside = window_channels(step, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
        scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
        if MATRIX:
            entries, within = matrix_entries(windows, WIDTH, BLOCK_K)
        else:
            entries, within = form_entries(windows, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
        form = tl.load(form_ptr + entries, mask=within, other=0.0)
        at = sample * BRANCHES + channel // WIDTH
        factor = over_pixels(load_masks(drop_ptr, keep_ptr, at, inside) * root, MATRIX)
        coefficient = tl.load(coefficient_ptr + at, mask=inside, other=0.0)
        coefficient = over_pixels(coefficient, MATRIX)
        offsets = base + over_pixels(channel, MATRIX)
        first = zeros(WINDOWS, BLOCK_P, BLOCK_K, MATRIX)
        second = zeros(WINDOWS, BLOCK_P, BLOCK_K, MATRIX)
        for start in range(0, PIXELS, BLOCK_P):
            z, real, pixel = load_rows(
                z_ptr + offsets, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL
            )
            upstream, real, pixel = load_rows(
                upstream_ptr + offsets, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL
            )
            grad = gradient_tile(
                z,
                upstream,
                factor,
                coefficient,
                form,
                scale,
                bias,
                real,
                AFFINE,
                MASKED,
                PRECISION,
            )
            if AFFINE:
                first += grad
                second += grad * z.to(tl.float32)
                grad *= scale
            grad = round_to(grad, z.dtype)
            store_rows(grad_ptr + offsets + pixel, grad, real, inside, PIXELS, BLOCK_P, FULL)
        if AFFINE:
            sums = sums_ptr + sample.to(tl.int64) * (2 * CHANNELS) + channel
            store_sums(sums, first, second, inside, CHANNELS)


hash_in_order(globals())
