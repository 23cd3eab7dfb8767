"""Triton: the coding loss (7) of all coded blocks of a network with its gradient, and decoding (9).

L blocks, B samples, N branches, K classes. A program takes BLOCK_B samples of one block. The
gradient is that of the loss itself; the backward pass multiplies it by a number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coded_resnext.kernels.tile import hash_in_order


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """`x^q` for `x >= 0`; whole exponents of the paper exactly as products."""
    if EXPONENT == 0.0:
        return x * 0.0 + 1.0
    elif EXPONENT == 1.0:
        return x
    elif EXPONENT == 2.0:
        return x * x
    elif EXPONENT == 3.0:
        return x * x * x
    elif EXPONENT == 4.0:
        return x * x * (x * x)
    else:
        return tl.where(x == 0.0, 0.0, tl.exp2(EXPONENT * tl.log2(tl.where(x == 0.0, 1.0, x))))


@triton.jit(do_not_specialize=["batch"])
def coding_loss(
    loss_ptr,
    grad_ptr,
    decoded_ptr,
    energies_ptr,
    codewords_ptr,
    targets_ptr,
    shares_ptr,
    threshold,
    batch,
    BRANCHES: tl.constexpr,
    BRANCHES_P: tl.constexpr,
    CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(7) `max(|r Ebar - codeword| - t, 0)^q` and its derivative; (9) where `decoded` is given.

    Grid: (B / BLOCK_B, L). `loss [L, programs]` are sums over samples; `grad
    [L, B, N]` is the gradient of the loss; `decoded [L, B]` int64 or None. `energies [L, B, N]`
    float32, `codewords [L, K, N]` bytes, `targets` classes `[B]` int64, or, when SOFT,
    probabilities `[B, K]` float32, `shares [B]` of the samples in the mean float32. A sample
    without a share is left out; the share of another one whose target is no class is NaN.
    """
    block = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BRANCHES_P)
    inside = (b < batch)[:, None] & (n < BRANCHES)[None, :]
    row = block.to(tl.int64) * batch + b
    energies = tl.load(energies_ptr + row[:, None] * BRANCHES + n[None, :], mask=inside, other=0.0)
    book = codewords_ptr + block.to(tl.int64) * (CLASSES * BRANCHES)
    ratio = tl.sum(tl.load(book + n, mask=n < BRANCHES, other=0).to(tl.float32), 0) / BRANCHES

    share = tl.load(shares_ptr + b, mask=b < batch, other=0.0)
    counted = inside & (share != 0.0)[:, None]
    wanted = tl.zeros((BLOCK_B, BRANCHES_P), tl.float32)
    if not SOFT:
        target = tl.load(targets_ptr + b, mask=b < batch, other=0)
        is_class = (target >= 0) & (target < CLASSES)
        share = tl.where(is_class | (share == 0.0), share, float("nan"))
        at = book + target[:, None] * BRANCHES + n[None, :]
        codeword = tl.load(at, mask=inside & is_class[:, None], other=0)
        wanted = codeword.to(tl.float32)
    if SOFT or decoded_ptr is not None:
        best = tl.full((BLOCK_B,), -1.0, tl.float32)
        decoded = tl.zeros((BLOCK_B,), tl.int64)
        for start in range(0, CLASSES, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            exists = (k < CLASSES)[:, None] & (n < BRANCHES)[None, :]
            codewords = tl.load(book + k[:, None] * BRANCHES + n[None, :], mask=exists, other=0)
            codewords = codewords.to(tl.float32)
            if SOFT:
                at = b.to(tl.int64)[:, None] * CLASSES + k[None, :]
                mask = (b < batch)[:, None] & (k < CLASSES)[None, :]
                probability = tl.load(targets_ptr + at, mask=mask, other=0.0)
                wanted = tl.dot(probability, codewords, wanted, input_precision="ieee")
            if decoded_ptr is not None:
                scores = tl.dot(energies, tl.trans(codewords), input_precision="ieee")
                # Energies are not negative, so -1 loses against every class.
                scores = tl.where((k < CLASSES)[None, :], scores, -1.0)
                top = tl.max(scores, 1)
                # Ties go to the lowest class, inside a block of classes and between them.
                decoded = tl.where(top > best, start + tl.argmax(scores, 1), decoded)
                best = tl.maximum(top, best)
        if decoded_ptr is not None:
            tl.store(decoded_ptr + row, decoded, mask=b < batch)

    deviation = ratio * energies - wanted
    distance = tl.abs(deviation) - threshold
    excess = tl.where(counted, tl.maximum(distance, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
    loss = tl.sum(tl.sum(power(excess, EXPONENT), 1) * share, 0) / BRANCHES
    tl.store(loss_ptr + block * tl.num_programs(0) + tl.program_id(0), loss)
    slope = EXPONENT * ratio / BRANCHES * share[:, None] * power(excess, EXPONENT - 1.0)
    slope = tl.where(deviation < 0, -slope, slope)
    # Inside the threshold, and for exponent 1 at a deviation of 0, the derivative is 0.
    grad = tl.where(excess == 0.0, 0.0, slope)
    tl.store(grad_ptr + row[:, None] * BRANCHES + n[None, :], grad, mask=inside)


hash_in_order(globals())
