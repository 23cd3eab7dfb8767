"""What evaluation does with the sums of the grouped 3x3 convolution before it writes them.

BatchNorm is in the weights and the bias, so that the ReLU is all that is left of it; and the
energies (11) are taken from what is written. A pixel of branch n adds `h^T Q_n h` to its energy.
One product with the block-diagonal forms of a window gives `Q h` at a row of lanes, each lane keeps
the sums of its own column, and no lane's pixels are of two samples. Tiles as in grouped_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import bounded, dot, hash_in_order, infinite_if_negative, rectify_real, round_to


@triton.jit
def first_sums(after_ptr, channel, inside, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """What the sums of an output pixel start from: the bias behind the convolution, or 0."""
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if after_ptr is not None:
        sums += tl.load(after_ptr + channel, mask=inside, other=0.0)[None, :]
    return sums


@triton.jit
def load_kept(keep_ptr, sample, real, channel, inside, CHANNELS: tl.constexpr):
    """The removal mask (10) of each lane and channel, `[BLOCK_M, BLOCK_K]`; None without one."""
    kept = None
    if keep_ptr is not None:
        at = keep_ptr + sample[:, None] * CHANNELS + channel[None, :]
        kept = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    return kept


@triton.jit
def load_forms(form_ptr, window, BLOCK_K: tl.constexpr, TERMS: tl.constexpr):
    """The terms whose sum is `Q` of a window's branches, `[BLOCK_K, BLOCK_K]` each."""
    k = tl.arange(0, BLOCK_K)
    SIZE: tl.constexpr = BLOCK_K * BLOCK_K
    forms = (0.0, 0.0)
    if form_ptr is not None:
        tile = form_ptr + window * (TERMS * SIZE) + k[:, None] * BLOCK_K + k[None, :]
        # In float32 the second is not there, and not used.
        forms = (tl.load(tile), tl.load(tile + (TERMS - 1) * SIZE))
    return forms


@triton.jit
def finish(acc, kept, dtype: tl.constexpr, RECTIFY: tl.constexpr):
    """What is written of the sums: rounded, and with RECTIFY behind the ReLU."""
    if kept is not None:
        acc *= kept
    return rectify_real(acc, None, dtype, False) if RECTIFY else round_to(acc, dtype)


@triton.jit
def add_energies(
    h, forms, energies, TERMS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr
):
    """Add `h_k (Q h)_k` of every lane and channel k, `h >= 0`; SHARED are windows of several
    branches, where a NaN or an infinity of one must not reach the others through zeros of Q."""
    operand = bounded(h, False) if SHARED else h
    product = dot(operand, forms[0], tl.zeros(h.shape, tl.float32), PRECISION)
    if TERMS == 2:
        product = dot(operand, forms[1], product, PRECISION)
    return energies + product * h.to(tl.float32)


@triton.jit
def store_energies(
    ptr,
    energies,
    row,
    exists,
    window,
    BRANCHES: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The lanes' sums over the channels of each branch of a window, to `ptr [rows, BRANCHES]`."""
    owner = tl.arange(0, BLOCK_K) // PADDED
    out = ptr + row * BRANCHES + window * GROUP
    for branch in tl.static_range(GROUP):
        mine = energies if GROUP == 1 else tl.where((owner == branch)[None, :], energies, 0.0)
        tl.store(out + branch, infinite_if_negative(tl.sum(mine, 1)), mask=exists)


hash_in_order(globals())
