"""Triton: branch energies from Gram matrices (11), and what their gradient adds to (16) and (17).

B samples, N branches of WIDTH = D channels, PIXELS = H*W. Activations are rows of channels,
`[B, PIXELS, N*D]`: channels-last. A program covers WINDOWS windows of GROUP branches (see tile.py)
and SAMPLES samples. `scale` and `bias` `[N*D]` are float32 or None, as for `tile.activate`; the
masks `[B, N]` are float32 or None; `form [N, D, D]` is `Q_n = W_n^T W_n` in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import (
    activate,
    by_branch,
    dot,
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


@triton.jit
def zeros(windows: tl.constexpr, height: tl.constexpr, width: tl.constexpr, MATRIX: tl.constexpr):
    """Sums to be, float32: `[windows, height, width]`, of a MATRIX `[height, width]`."""
    return tl.zeros((height, width) if MATRIX else (windows, height, width), tl.float32)


@triton.jit
def window_gram(
    rows,
    inside,
    scale,
    bias,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`G = h h^T` over the pixels of one sample, float32.

    `[windows, BLOCK_K, BLOCK_K]`, of a matrix `[BLOCK_K, BLOCK_K]`; `rows` as for `load_rows`.
    """
    MATRIX: tl.constexpr = len(rows.shape) == 2
    BLOCK_K: tl.constexpr = inside.shape[1]
    gram = zeros(inside.shape[0], BLOCK_K, BLOCK_K, MATRIX)
    for start in range(0, PIXELS, BLOCK_P):
        z, real, _ = load_rows(rows, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL)
        h = activate(z, scale, bias, real, AFFINE, PIXELS % BLOCK_P != 0)
        transposed = tl.trans(h) if MATRIX else tl.permute(h, (0, 2, 1))
        gram = dot(transposed, h, gram, PRECISION)
    return gram


@triton.jit
def window_energy(gram, form, inverse_size, WIDTH: tl.constexpr, GROUP_P: tl.constexpr):
    """(11) `<Q, G> / (C P)` of the branches of each window, `[windows, GROUP_P]`."""
    products = rounded_product(gram, form)
    if GROUP_P > 1:
        # Between two branches the form is 0, but 0 times a NaN of one of them is NaN.
        owner = tl.arange(0, gram.shape[1]) // WIDTH
        products = tl.where((owner[:, None] == owner[None, :])[None, :, :], products, 0.0)
    # Both matrices are symmetric; the sum over rows is the cheaper one.
    energy = by_branch(tl.sum(products, 1), WIDTH, GROUP_P) * inverse_size
    # Both are positive semidefinite; rounding must not make the energy negative.
    return tl.maximum(energy, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gradient_tile(
    z,
    upstream,
    factor,
    coefficient,
    form,
    scale,
    bias,
    real,
    AFFINE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(16) `factor u + coefficient Q h`, behind the ReLU where there is one; float32.

    It is 0 in rows that are not real, where `h` and `upstream` are.
    """
    h = activate(z, scale, bias, real, AFFINE, MASKED)
    if z.dtype == tl.float16:
        # Sums over all output channels: without the scale they leave the range of float16.
        last: tl.constexpr = len(form.shape) - 1
        largest = tl.max(tl.max(tl.abs(form), last, keep_dims=True), last - 1, keep_dims=True)
        largest = tl.where(largest > 0.0, largest, 1.0)
        form = form / largest
        coefficient = coefficient * largest
    form = round_to(form, z.dtype)
    grad = dot(h, form, tl.zeros(z.shape, tl.float32), PRECISION) * coefficient
    if upstream is not None:
        grad += upstream.to(tl.float32) * factor
    if AFFINE:
        grad = tl.where(z.to(tl.float32) * scale + bias > 0, grad, 0.0)
    return grad


@triton.jit
def store_sums(pointers, first, second, inside, CHANNELS: tl.constexpr):
    """Store two tiles' sums over the pixels, CHANNELS apart."""
    if len(first.shape) == 2:
        first, second = first[None, :, :], second[None, :, :]
    tl.store(pointers, tl.sum(first, 1), mask=inside)
    tl.store(pointers + CHANNELS, tl.sum(second, 1), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def energy_forward(
    energy_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    form_ptr,
    keep_ptr,
    inverse_size,
    batch,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(2), (10), (11): `E[b, n] = keep <Q_n, G[b, n]> / (C P)`.

    Grid: (B / SAMPLES, windows / WINDOWS). `energy [B, N]` float32; `inverse_size` is `1 / (C P)`.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    MATRIX: tl.constexpr = WINDOWS == 1 and BLOCK_K > 16
    FULL: tl.constexpr = GROUP * WIDTH == BLOCK_K and BRANCHES % (GROUP * WINDOWS) == 0
    windows, channel, inside = window_channels(
        tl.program_id(1), BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K
    )
    member = tl.arange(0, GROUP_P)
    branch = windows[:, None] * GROUP + member[None, :]
    real = (member < GROUP)[None, :] & (branch < BRANCHES)
    scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
    entries, within = form_entries(windows, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
    form = tl.load(form_ptr + entries, mask=within, other=0.0)
    for i in range(SAMPLES):
        sample = tl.program_id(0) * SAMPLES + i
        if sample < batch:
            rows = z_ptr + sample.to(tl.int64) * (PIXELS * CHANNELS) + over_pixels(channel, MATRIX)
            gram = window_gram(
                rows,
                inside,
                scale,
                bias,
                AFFINE,
                CHANNELS,
                PIXELS,
                BLOCK_P,
                FULL,
                PRECISION,
            )
            if MATRIX:
                gram = gram[None, :, :]
            energy = window_energy(gram, form, inverse_size, WIDTH, GROUP_P)
            at = sample * BRANCHES + branch
            if keep_ptr is not None:
                energy *= tl.load(keep_ptr + at, mask=real, other=0.0)
            tl.store(energy_ptr + at, energy, mask=real)


@triton.jit(do_not_specialize=["batch"])
def energy_backward(
    grad_ptr,
    sums_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    form_ptr,
    coefficient_ptr,
    batch,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(16): `grad = scale relu'(.) coefficient[b, n] Q_n h_n`, and the sums for the BN before it.

    Grid: (B / SAMPLES, windows / WINDOWS). `grad [B, PIXELS, N*D]` in the dtype of `z`;
    `coefficient [B, N]` is `2 dE / (C P)`. With an affine map, `sums [programs, 2, N*D]` are each
    program's sums of the gradient behind the map, and of that times `z`; float32.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    MATRIX: tl.constexpr = WINDOWS == 1 and BLOCK_K > 16
    FULL: tl.constexpr = GROUP * WIDTH == BLOCK_K and BRANCHES % (GROUP * WINDOWS) == 0
    windows, channel, inside = window_channels(
        tl.program_id(1), BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K
    )
    scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
    if MATRIX:
        entries, within = matrix_entries(windows, WIDTH, BLOCK_K)
    else:
        entries, within = form_entries(windows, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
    form = tl.load(form_ptr + entries, mask=within, other=0.0)
    first = zeros(WINDOWS, BLOCK_P, BLOCK_K, MATRIX)
    second = zeros(WINDOWS, BLOCK_P, BLOCK_K, MATRIX)
    for i in range(SAMPLES):
        sample = tl.program_id(0) * SAMPLES + i
        if sample < batch:
            base = sample.to(tl.int64) * (PIXELS * CHANNELS) + over_pixels(channel, MATRIX)
            at = sample * BRANCHES + channel // WIDTH
            coefficient = tl.load(coefficient_ptr + at, mask=inside, other=0.0)
            coefficient = over_pixels(coefficient, MATRIX)
            for start in range(0, PIXELS, BLOCK_P):
                z, real, offsets = load_rows(
                    z_ptr + base, start, inside, CHANNELS, PIXELS, BLOCK_P, FULL
                )
                grad = gradient_tile(
                    z,
                    None,
                    None,
                    coefficient,
                    form,
                    scale,
                    bias,
                    real,
                    AFFINE,
                    PIXELS % BLOCK_P != 0,
                    PRECISION,
                )
                if AFFINE:
                    first += grad
                    second += grad * z.to(tl.float32)
                    grad *= scale
                grad = round_to(grad, z.dtype)
                store_rows(grad_ptr + base + offsets, grad, real, inside, PIXELS, BLOCK_P, FULL)
    if AFFINE:
        at = tl.program_id(0).to(tl.int64) * (2 * CHANNELS) + channel
        store_sums(sums_ptr + at, first, second, inside, CHANNELS)


@triton.jit(do_not_specialize=["batch"])
def weighted_gram(
    gram_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    coefficient_ptr,
    batch,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(17): each program's part of `sum_b coefficient[b, n] G[b, n]`.

    Grid: (B / SAMPLES, windows / WINDOWS). `gram [programs, N, D, D]` float32.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    MATRIX: tl.constexpr = WINDOWS == 1 and BLOCK_K > 16
    FULL: tl.constexpr = GROUP * WIDTH == BLOCK_K and BRANCHES % (GROUP * WINDOWS) == 0
    windows, channel, inside = window_channels(
        tl.program_id(1), BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K
    )
    scale, bias = load_affine(scale_ptr, bias_ptr, channel, inside, MATRIX)
    total = zeros(WINDOWS, BLOCK_K, BLOCK_K, MATRIX)
    for i in range(SAMPLES):
        sample = tl.program_id(0) * SAMPLES + i
        if sample < batch:
            rows = z_ptr + sample.to(tl.int64) * (PIXELS * CHANNELS) + over_pixels(channel, MATRIX)
            gram = window_gram(
                rows,
                inside,
                scale,
                bias,
                AFFINE,
                CHANNELS,
                PIXELS,
                BLOCK_P,
                FULL,
                PRECISION,
            )
            at = sample * BRANCHES + channel // WIDTH
            coefficient = tl.load(coefficient_ptr + at, mask=inside, other=0.0)
            if MATRIX:
                coefficient = tl.reshape(coefficient, (BLOCK_K,))
            total += gram * tl.expand_dims(coefficient, -1)
    if MATRIX:
        total = total[None, :, :]
    entries, within = form_entries(windows, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
    program = tl.program_id(0).to(tl.int64) * (BRANCHES * WIDTH * WIDTH)
    tl.store(gram_ptr + program + entries, total, mask=within)


hash_in_order(globals())
