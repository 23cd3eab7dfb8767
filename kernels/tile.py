"""Tile-level helpers that the kernels share; no loads or stores of tensors.

A *window* is a run of channels that holds whole branches: GROUP branches of WIDTH channels, padded
to BLOCK_K. Tiles are `[windows, pixels, channels of a window]`, so that one batched product gives
every warp a window of its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32; the interpreter multiplies the bits of bfloat16, so it widens."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even; the interpreter truncates to bfloat16 by itself."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # Adding to the bits of a NaN could carry it into infinity or zero.
        bits = tl.where(x != x, 0x7FC00000, rounded).to(tl.uint32)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def rectify(x):
    """ReLU that keeps NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, scale, bias, valid, AFFINE: tl.constexpr, MASKED: tl.constexpr):
    """`relu(scale z + bias)` in the dtype of `z`, 0 outside `valid`; `z` itself without AFFINE.

    The affine map is float32. Rounding before the ReLU gives the same numbers and lets two of them
    share an instruction; the interpreter would compare the bits of bfloat16. `z` is 0 outside
    `valid`, but its image under the map need not be.
    """
    if not AFFINE:
        return z
    h = z.to(tl.float32) * scale + bias
    h = round_to(rectify(h), z.dtype) if INTERPRETED else rectify(round_to(h, z.dtype))
    return tl.where(valid, h, 0.0) if MASKED else h


@triton.jit
def by_branch(x, WIDTH: tl.constexpr, GROUP_P: tl.constexpr):
    """Sums over the channels of each branch: `[windows, BLOCK_K]` to `[windows, GROUP_P]`."""
    owner = tl.arange(0, x.shape[1]) // WIDTH
    mine = owner[:, None] == tl.arange(0, GROUP_P)[None, :]
    return tl.sum(tl.where(mine[None, :, :], x[:, :, None], 0.0), 1)


def hash_in_order(module: dict[str, Any]) -> None:
    """Hash the kernels of a module in the order of their definition.

    In Triton 3.6 the cache key of a kernel depends on whether its helpers were hashed before it;
    one order makes the keys of kernels built ahead of time those of the running program.
    """
    for value in list(module.values()):
        if isinstance(value, triton.runtime.jit.JITCallable):
            value.cache_key  # noqa: B018


hash_in_order(globals())
