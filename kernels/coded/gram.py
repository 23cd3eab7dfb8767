"""The exact Gram form of the coded aggregation in plain PyTorch: the CPU path and the fallback.

A branch's output is linear in its D channels, so its energy follows from a D x D Gram matrix,
(11) of docs/math.md, and the branch sum is one dense 1x1 convolution, (12). The branch tensor
`[B, N, C, H, W]` is never formed.

Shapes: B samples, N branches of width D, C output channels of a branch, P = H*W pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from coded_resnext.kernels.layout import accumulation_dtype

from .reference import is_dead


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def branch_grams(h: Tensor, branches: int) -> Tensor:
    """`G[b, n] = h_n h_n^T` over the pixels: `[B, N*D, H, W]` to `[B, N, D, D]`."""
    batch, channels, height, width = h.shape
    depth, pixels = channels // branches, height * width
    if _is_channels_last(h):
        # bmm reads the strided slice of one branch in place; all branches at once would copy.
        rows = h.permute(0, 2, 3, 1).view(batch, pixels, branches, depth)
        slices = rows.unbind(2)
        return torch.stack([torch.bmm(part.transpose(1, 2), part) for part in slices], 1)
    columns = h.reshape(batch * branches, depth, pixels)
    grams = torch.bmm(columns, columns.transpose(1, 2))
    return grams.view(batch, branches, depth, depth)


def apply_per_branch(matrices: Tensor, h: Tensor) -> Tensor:
    """`A[b, n] h_n` for symmetric `A [B, N, D, D]`: a tensor like `h [B, N*D, H, W]`."""
    batch, branches, depth, _ = matrices.shape
    height, width = h.shape[2:]
    if _is_channels_last(h):
        rows = h.permute(0, 2, 3, 1).view(batch, height * width, branches, depth)
        products = [torch.bmm(rows[:, :, n], matrices[:, n]) for n in range(branches)]
        return torch.cat(products, 2).view(batch, height, width, -1).permute(0, 3, 1, 2)
    columns = h.reshape(batch * branches, depth, height * width)
    return torch.bmm(matrices.flatten(0, 1), columns).view_as(h)


def branch_forms(branch_weight: Tensor, accumulate: torch.dtype) -> Tensor:
    """`Q_n = W_n^T W_n` of (11): `[N, C, D]` to `[N, D, D]`."""
    weight = branch_weight.to(accumulate)
    return torch.bmm(weight.transpose(1, 2), weight)


def energies_and_grams(
    h: Tensor, branch_weight: Tensor, keep_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(10), (11): `E [B, N]` of `h` in its accumulation dtype, and the Grams `[B, N, D, D]`."""
    branches, out_channels, _ = branch_weight.shape
    grams = branch_grams(h, branches)
    # The form and the Gram are positive semidefinite; rounding must not make it negative.
    form = branch_forms(branch_weight, h.dtype)
    energy = torch.einsum("bnij,nij->bn", grams, form).clamp_min(0)
    energy = energy / (out_channels * h.shape[2] * h.shape[3])
    return (energy if keep_mask is None else energy * keep_mask), grams


def energy_gradients(
    grad_energy: Tensor, h: Tensor, branch_weight: Tensor, grams: Tensor
) -> tuple[Tensor, Tensor]:
    """What `dE [B, N]` adds to (16) and (17): gradients of `h` and of `branch_weight`."""
    out_channels = branch_weight.shape[1]
    coefficient = grad_energy * (2.0 / (out_channels * h.shape[2] * h.shape[3]))
    form = branch_forms(branch_weight, h.dtype)
    grad_h = apply_per_branch(coefficient[:, :, None, None] * form, h)
    weighted = torch.einsum("bn,bnij->nij", coefficient, grams)
    return grad_h, torch.bmm(branch_weight.to(h.dtype), weighted)


class Normalized(NamedTuple):
    """What `normalize` gives; all but `scaled` in the accumulation dtype."""

    scaled: Tensor
    """`s h`, like `h`."""
    energies: Tensor
    """`Ebar [B, N]`."""
    inverse: Tensor
    """`1/M [B, 1]`, 0 for a dead sample."""
    scale: Tensor
    """`s [B, N]`, or `[B, 1]` where all branches share one."""
    grams: Tensor
    """`[B, N, D, D]`."""


def inverse_mean(energy: Tensor) -> Tensor:
    """`1/M` of (3), `[B, N]` to `[B, 1]`; 0 for a dead sample."""
    mean = energy.mean(1, keepdim=True)
    dead = is_dead(mean)
    return torch.where(dead, 0.0, 1.0 / torch.where(dead, 1.0, mean))


def normalize(
    h: Tensor, branch_weight: Tensor, drop_mask: Tensor | None, keep_mask: Tensor | None
) -> Normalized:
    """(2)-(5), (10)-(12) up to the convolution."""
    wide = h.to(accumulation_dtype(h.dtype))
    energy, grams = energies_and_grams(wide, branch_weight, keep_mask)
    inverse = inverse_mean(energy)
    scale = inverse.sqrt()
    for mask in (drop_mask, keep_mask):
        if mask is not None:
            scale = scale * mask
    scaled = wide * _per_channel(scale, branch_weight.shape[2])
    # Under torch 2.11's compiler an output that went through a `to` without effect loses its
    # gradient; so none is applied where nothing is to be done.
    if scaled.dtype != h.dtype:
        scaled = scaled.to(h.dtype)
    return Normalized(scaled, energy * inverse, inverse, scale, grams)


def normalize_backward(
    grad_scaled: Tensor,
    grad_energies: Tensor,
    h: Tensor,
    branch_weight: Tensor,
    forward: Normalized,
    keep_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(13)-(17) without the part of `dW` that the convolution computes, in float32 or float64."""
    branches, _, depth = branch_weight.shape
    accumulate = forward.energies.dtype
    grad = grad_scaled.to(accumulate)
    # (13), (14): sum_n m ds / sqrt(M) is the inner product of s h with its gradient.
    through_scale = (forward.scaled * grad).sum((1, 2, 3))[:, None]
    through_energies = (grad_energies * forward.energies).sum(1, keepdim=True)
    grad_mean = -forward.inverse * (0.5 * through_scale + through_energies)
    grad_energy = grad_energies * forward.inverse + grad_mean / branches
    if keep_mask is not None:
        grad_energy = grad_energy * keep_mask
    grad_h, grad_weight = energy_gradients(
        grad_energy, h.to(accumulate), branch_weight, forward.grams
    )
    return grad_h.addcmul(grad, _per_channel(forward.scale, depth)), grad_weight


class _NormalizeBranches(torch.autograd.Function):
    """`(h, W) -> (s h, Ebar)` with the gradients (14)-(17) written out.

    Kept for the backward pass: `h`, `s h` (which the convolution behind keeps anyway), the Grams
    and other tensors of size `B*N`. The gradient of `W` through the convolution is not ours.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        branch_weight: Tensor,
        drop_mask: Tensor | None,
        keep_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        result = normalize(h, branch_weight, drop_mask, keep_mask)
        ctx.save_for_backward(h, branch_weight, keep_mask, *result)
        return result.scaled, result.energies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_scaled: Tensor, grad_energies: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        h, branch_weight, keep_mask, *saved = ctx.saved_tensors
        grad_h, grad_weight = normalize_backward(
            grad_scaled, grad_energies, h, branch_weight, Normalized(*saved), keep_mask
        )
        return grad_h.to(h.dtype), grad_weight.to(branch_weight.dtype), None, None


def _per_channel(scale: Tensor, depth: int) -> Tensor:
    """`[B, N]`, or `[B, 1]` where all branches share one, broadcast over `[B, N*D, H, W]`."""
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(depth, 1)
    return scale[:, :, None, None]


def coded_aggregate(
    h: Tensor,
    weight: Tensor,
    branches: int,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    *,
    concatenate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Energies, normalisation, DropSubNNs and branch sum by (11)-(12).

    Args:
        h: `[B, N*D, H, W]`, contiguous or channels-last; other layouts are copied.
        weight: the 1x1 convolution, `[C, N*D, 1, 1]`, or `[C, D, 1, 1]` when concatenated.
        branches: `N`.
        drop_mask, keep_mask: as for the reference, in the accumulation dtype.
        concatenate: as for the reference.

    Returns:
        `y [B, C, H, W]` and the normalised energies `[B, N]`, as the reference.
    """
    if not (h.is_contiguous() or _is_channels_last(h)):
        h = h.contiguous()
    per_branch = split_weight(weight, branches, concatenate=concatenate)
    # Autocast would take the small matrix products, and with them the energies, to half precision.
    if not h.is_meta and torch.is_autocast_enabled(h.device.type):
        with torch.autocast(h.device.type, enabled=False):
            scaled, energies = _NormalizeBranches.apply(h, per_branch, drop_mask, keep_mask)
    else:
        scaled, energies = _NormalizeBranches.apply(h, per_branch, drop_mask, keep_mask)
    return F.conv2d(scaled, weight, groups=branches if concatenate else 1), energies


def split_weight(weight: Tensor, branches: int, *, concatenate: bool) -> Tensor:
    """One matrix per branch, `[N, C, D]` (`[N, C/N, D]` when concatenated), a view."""
    if concatenate:
        return weight.reshape(branches, -1, weight.shape[1])
    return weight.reshape(weight.shape[0], branches, -1).transpose(0, 1)


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
