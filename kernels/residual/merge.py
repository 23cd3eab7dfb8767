"""Triton: one set of statistics from the partial ones that many programs have left behind."""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import hash_in_order


@triton.jit(do_not_specialize=["parts"])
def merge_statistics(
    total_ptr,
    partial_ptr,
    parts,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Chan's formula for any number of parts: `partial [parts, 3, C]` to `total [3, C]`, float32.

    The three are count, sum and M2, the sum of squared deviations from the mean. The mean of all is
    known before the parts' M2 are added, each with `count (its mean - the mean)^2`; no large
    numbers are subtracted, and the order of the additions depends on `parts` alone. Sums are
    float64: counts and sums of a large batch are beyond the 24 bits of float32.
    Grid: ceil(C / BLOCK_C).
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    part = tl.arange(0, BLOCK_T)[:, None]
    inside = channel < CHANNELS
    counts = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_T):
        row = (start + part).to(tl.int64)
        at = partial_ptr + row * (3 * CHANNELS) + channel
        valid = (row < parts) & inside
        counts += tl.load(at, mask=valid, other=0.0).to(tl.float64)
        sums += tl.load(at + CHANNELS, mask=valid, other=0.0).to(tl.float64)
    count = tl.sum(counts, 0)[None, :]
    total = tl.sum(sums, 0)[None, :]
    mean = total / tl.where(count > 0, count, 1.0)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_T):
        row = (start + part).to(tl.int64)
        at = partial_ptr + row * (3 * CHANNELS) + channel
        valid = (row < parts) & inside
        n = tl.load(at, mask=valid, other=0.0).to(tl.float64)
        own = tl.load(at + CHANNELS, mask=valid, other=0.0).to(tl.float64)
        off = own / tl.where(n > 0, n, 1.0) - mean
        squares += tl.load(at + 2 * CHANNELS, mask=valid, other=0.0).to(tl.float64) + n * off * off
    m2 = tl.sum(squares, 0)[None, :]
    tl.store(total_ptr + channel, count.to(tl.float32), mask=inside)
    tl.store(total_ptr + CHANNELS + channel, total.to(tl.float32), mask=inside)
    tl.store(total_ptr + 2 * CHANNELS + channel, m2.to(tl.float32), mask=inside)


hash_in_order(globals())
