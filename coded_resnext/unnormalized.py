"""The ablation without energy normalisation: (1)-(6) of docs/math.md with `M` replaced by 1.

Letters: B samples, N branches of width D, C output channels, P pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.gram import branch_grams, split_weight
from .kernels.reference import accumulation_dtype


def unnormalized_aggregate(
    h: Tensor,
    weight: Tensor,
    branches: int,
    *,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    concatenate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Branch energies and branch sum: `y = sum_n m_n T_n`, and `E` itself in place of `Ebar`.

    Args:
        h: activations of all branches, `[B, N*D, H, W]`.
        weight: expand convolution, `[C, N*D, 1, 1]`; `[C, D, 1, 1]` to concatenate.
        branches: `N`.
        drop_mask: DropSubNNs, (5), `[B, N]`.
        keep_mask: branch removal, (10), `[B, N]`.
        concatenate: branch `n` writes channels of its own.

    Returns:
        `y [B, C, H, W]`, and the energies `[B, N]`, (2), in float32 (float64 for float64 input).
        Nothing bounds their sum, so that the coding loss (7) asks for `r E = 1` of active branches.
    """
    accumulate = accumulation_dtype(h.dtype)
    per_branch = split_weight(weight, branches, concatenate=concatenate).to(accumulate)
    form = torch.bmm(per_branch.transpose(1, 2), per_branch)
    with torch.autocast(h.device.type, enabled=False):
        grams = branch_grams(h.to(accumulate), branches)
        energies = torch.einsum("bnij,nij->bn", grams, form).clamp_min(0)
    energies = energies / (per_branch.shape[1] * h.shape[2] * h.shape[3])
    width = h.shape[1] // branches
    for mask in (drop_mask, keep_mask):
        if mask is not None:
            h = h * mask.to(h.dtype).repeat_interleave(width, 1)[:, :, None, None]
    if keep_mask is not None:
        energies = energies * keep_mask
    return F.conv2d(h, weight, groups=branches if concatenate else 1), energies
