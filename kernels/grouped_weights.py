"""Triton: weights of a grouped 3x3 convolution in and out of the block-diagonal windows.

N groups of WIDTH = D channels; a window holds GROUP groups, each in PADDED >= WIDTH channels, and
is a `BLOCK_K x BLOCK_K` matrix for each of the nine taps. What no pair of channels of one group
belongs to is zero on the way in and skipped on the way out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import hash_in_order, round_to


@triton.jit
def weight_index(
    window,
    tap,
    source,
    target,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Where `[N*D, D, 3, 3]` keeps the weight from channel `source` to channel `target` of a
    window, and whether there is such a weight."""
    group = source // PADDED
    real = (group == target // PADDED) & (group < GROUP) & (window * GROUP + group < GROUPS)
    real = real & (source % PADDED < WIDTH) & (target % PADDED < WIDTH)
    row = (window * GROUP + group) * WIDTH + target % PADDED
    return (row * WIDTH + source % PADDED) * 9 + tap, real


@triton.jit
def pack_weights(
    packed_ptr,
    weight_ptr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    MIRROR: tl.constexpr,
):
    """`weight [N*D, D, 3, 3]` to `packed [windows, 9, BLOCK_K, BLOCK_K]`, from row to column.

    TRANSPOSE exchanges the two channels and MIRROR reverses the taps. Grid: windows * 9.
    """
    window = tl.program_id(0) // 9
    tap = tl.program_id(0) % 9
    k = tl.arange(0, BLOCK_K)
    source = k[None, :] if TRANSPOSE else k[:, None]
    target = k[:, None] if TRANSPOSE else k[None, :]
    at, real = weight_index(
        window, 8 - tap if MIRROR else tap, source, target, GROUPS, WIDTH, PADDED, GROUP
    )
    out = packed_ptr + tl.program_id(0) * (BLOCK_K * BLOCK_K) + k[:, None] * BLOCK_K + k[None, :]
    tl.store(out, tl.load(weight_ptr + at, mask=real, other=0.0))


@triton.jit(do_not_specialize=["splits"])
def reduce_weight_gradient(
    gradient_ptr,
    partial_ptr,
    splits,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum `partial [splits, windows, 9, BLOCK_K, BLOCK_K]` float32 into `gradient [N*D, D, 3, 3]`.

    Grid: windows * 9 * (BLOCK_K^2 / BLOCK_E). The order of the additions depends on nothing but
    `splits`.
    """
    CHUNKS: tl.constexpr = BLOCK_K * BLOCK_K // BLOCK_E
    matrix = tl.program_id(0) // CHUNKS
    element = (tl.program_id(0) % CHUNKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    matrices: tl.constexpr = (GROUPS + GROUP - 1) // GROUP * 9
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = (start + s)[:, None].to(tl.int64)
        at = (split * matrices + matrix) * (BLOCK_K * BLOCK_K) + element[None, :]
        total += tl.load(partial_ptr + at, mask=split < splits, other=0.0)
    at, real = weight_index(
        matrix // 9, matrix % 9, element // BLOCK_K, element % BLOCK_K, GROUPS, WIDTH, PADDED, GROUP
    )
    value = tl.sum(total, 0)
    tl.store(gradient_ptr + at, round_to(value, gradient_ptr.dtype.element_ty), mask=real)


hash_in_order(globals())
