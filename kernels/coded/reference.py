"""The definition of every coded operation, unfused, in plain PyTorch.

This file is the oracle: it follows docs/math.md line by line and forms the branch tensor
`T [B, N, C, H, W]`, N times the size of the block's output. Use it to check, never to train.

Shapes: B samples, N branches of width D, C output channels, H x W maps of P pixels, K classes.
Weights come one matrix per branch, `[N, C, D]`. Under concatenation a branch writes C/N channels,
and `C` below stands for that number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.layout import accumulation_dtype, without_autocast

# A sample whose mean energy is not above this is dead: nothing flows through it, in either
# direction. Its square root and the powers that the gradients need stay inside float32.
DEAD_ENERGY = 1e-24


@without_autocast
def branch_outputs(h: Tensor, branch_weight: Tensor) -> Tensor:
    """(1) `T_n = W_n h_n`: `[B, N*D, H, W]` and `[N, C, D]` to `[B, N, C, H, W]`."""
    branches, _, width = branch_weight.shape
    per_branch = h.reshape(h.shape[0], branches, width, *h.shape[2:])
    return torch.einsum("ncd,bndhw->bnchw", branch_weight.to(h.dtype), per_branch)


def branch_energy(h: Tensor, branch_weight: Tensor) -> Tensor:
    """(2) `E [B, N]` from the branch outputs."""
    return branch_outputs(h, branch_weight).square().mean((2, 3, 4))


def is_dead(mean: Tensor) -> Tensor:
    """Samples whose mean energy (3) is too small to divide by. A NaN is not dead: it stays NaN."""
    return mean <= DEAD_ENERGY


def coded_aggregate(
    h: Tensor,
    branch_weight: Tensor,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    *,
    concatenate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns energies, normalisation, DropSubNNs and branch sum, (1)-(6) and (10).

    Args:
        h: `[B, N*D, H, W]`, the activations of all branches.
        branch_weight: `[N, C, D]`.
        drop_mask: `[B, N]`, (5), zero or `1 / (1 - p)`; applied after the energies were taken.
        keep_mask: `[B, N]`, (10), zero or one; applied before.
        concatenate: stack the branches along the channels instead of summing them.

    Returns:
        `y [B, C, H, W]` (`[B, N*C, H, W]` when concatenated) in the dtype of `h`, and the
        normalised energies `Ebar [B, N]`, float64 for float64 input and float32 otherwise.
    """
    outputs = branch_outputs(h, branch_weight)
    return aggregate_outputs(outputs, drop_mask, keep_mask, concatenate=concatenate)


def aggregate_outputs(
    outputs: Tensor,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    *,
    concatenate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns what `coded_aggregate` returns, from branch outputs `[B, N, C, H, W]`."""
    dtype, accumulate = outputs.dtype, accumulation_dtype(outputs.dtype)
    outputs = outputs.to(accumulate)
    if keep_mask is not None:
        outputs = outputs * keep_mask.to(accumulate)[:, :, None, None, None]
    energy = outputs.square().mean((2, 3, 4))
    mean = energy.mean(1, keepdim=True)
    dead = is_dead(mean)
    # Dead samples divide by 1, and what that gives is replaced by 0, value and gradient.
    divisor = torch.where(dead, 1.0, mean)
    normalized = outputs / divisor.sqrt()[:, :, None, None, None]
    normalized = torch.where(dead[:, :, None, None, None], 0.0, normalized)
    if drop_mask is not None:
        normalized = normalized * drop_mask.to(accumulate)[:, :, None, None, None]
    y = normalized.flatten(1, 2) if concatenate else normalized.sum(1)
    return y.to(dtype), torch.where(dead, 0.0, energy / divisor)
