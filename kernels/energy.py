"""Triton: branch energies from Gram matrices (11), and their gradient, the energy part of (16)-(17).

B samples, N branches of WIDTH = D channels, PIXELS = H*W. Activations are rows of channels,
`[B, PIXELS, N*D]`: channels-last. A program covers WINDOWS windows of GROUP branches (see tile.py)
and SAMPLES samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import activate, by_branch, dot, hash_in_order


@triton.jit
def load_forms(
    form_ptr,
    windows,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`Q_n = W_n^T W_n` of every branch on the diagonal of its window, `[windows, K, K]` float32."""
    k = tl.arange(0, BLOCK_K)
    if WIDTH == BLOCK_K:
        offsets = windows[:, None, None] * (WIDTH * WIDTH) + k[None, :, None] * WIDTH + k
        if BRANCHES % WINDOWS == 0:
            return tl.load(form_ptr + offsets)
        return tl.load(form_ptr + offsets, mask=windows[:, None, None] < BRANCHES, other=0.0)
    owner = k // WIDTH
    branch = windows[:, None, None] * GROUP + owner[None, :, None]
    offsets = (branch * WIDTH + (k % WIDTH)[None, :, None]) * WIDTH + (k % WIDTH)[None, None, :]
    inside = (owner[:, None] == owner[None, :]) & (owner < GROUP)[:, None]
    return tl.load(form_ptr + offsets, mask=inside[None, :, :] & (branch < BRANCHES), other=0.0)


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

    Grid: (B / SAMPLES, windows / WINDOWS). `energy [B, N]` float32; `scale`, `bias [N*D]` float32
    or None; `form [N, D, D]` float32; `keep [B, N]` float32 or None.
    """
    CHANNELS: tl.constexpr = BRANCHES * WIDTH
    AFFINE: tl.constexpr = scale_ptr is not None
    FULL: tl.constexpr = GROUP * WIDTH == BLOCK_K and BRANCHES % (GROUP * WINDOWS) == 0
    EVEN: tl.constexpr = PIXELS % BLOCK_P == 0
    windows = tl.program_id(1) * WINDOWS + tl.arange(0, WINDOWS)
    k = tl.arange(0, BLOCK_K)
    p = tl.arange(0, BLOCK_P)
    channel = windows[:, None] * (GROUP * WIDTH) + k[None, :]
    inside = (k < GROUP * WIDTH)[None, :] & (channel < CHANNELS)
    branch = windows[:, None] * GROUP + tl.arange(0, GROUP_P)[None, :]
    real = (tl.arange(0, GROUP_P) < GROUP)[None, :] & (branch < BRANCHES)
    scale = 0.0
    bias = 0.0
    if AFFINE:
        scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)[:, None, :]
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)[:, None, :]
    form = load_forms(form_ptr, windows, BRANCHES, WIDTH, GROUP, WINDOWS, BLOCK_K)
    for i in range(SAMPLES):
        sample = tl.program_id(0) * SAMPLES + i
        if sample < batch:
            rows = z_ptr + sample.to(tl.int64) * (PIXELS * CHANNELS) + channel[:, None, :]
            gram = tl.zeros((WINDOWS, BLOCK_K, BLOCK_K), tl.float32)
            for start in range(0, PIXELS, BLOCK_P):
                offsets = (start + p)[None, :, None] * CHANNELS
                valid = (start + p < PIXELS)[None, :, None]
                if FULL and EVEN:
                    z = tl.load(rows + offsets)
                elif FULL:
                    z = tl.load(rows + offsets, mask=valid, other=0.0)
                else:
                    z = tl.load(rows + offsets, mask=valid & inside[:, None, :], other=0.0)
                h = activate(z, scale, bias, valid, AFFINE, not EVEN)
                gram = dot(tl.permute(h, (0, 2, 1)), h, gram, PRECISION)
            # Both matrices are symmetric; the sum over rows is the cheaper one.
            energy = by_branch(tl.sum(gram * form, 1), WIDTH, GROUP_P) * inverse_size
            # Both are positive semidefinite; rounding must not make the energy negative.
            energy = tl.maximum(energy, 0.0, propagate_nan=tl.PropagateNan.ALL)
            at = sample * BRANCHES + branch
            if keep_ptr is not None:
                energy *= tl.load(keep_ptr + at, mask=real, other=0.0)
            tl.store(energy_ptr + at, energy, mask=real)


hash_in_order(globals())
