"""The exact Gram form of the coded aggregation in plain PyTorch: the CPU path and the fallback.

A branch's output is linear in its D channels, so its energy follows from a D x D Gram matrix,
(11) of docs/math.md, and the branch sum is one dense 1x1 convolution, (12). The branch tensor
`[B, N, C, H, W]` is never formed.

Shapes: B samples, N branches of width D, C output channels of a branch, P = H*W pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels.layout import accumulation_dtype, transformed, without_autocast

from .reference import is_dead


def _is_channels_last(x: Tensor) -> bool:
    # Asked this way, since vmap answers no question for a memory format.
    return x.permute(0, 2, 3, 1).is_contiguous() and not x.is_contiguous()


@without_autocast
def branch_grams(h: Tensor, branches: int) -> Tensor:
    """Returns `G[b, n] = h_n h_n^T` over the pixels: `[B, N*D, H, W]` to `[B, N, D, D]`."""
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
    """Returns `A[b, n] h_n` for symmetric `A [B, N, D, D]`: a tensor like `h [B, N*D, H, W]`."""
    batch, branches, depth, _ = matrices.shape
    height, width = h.shape[2:]
    if _is_channels_last(h):
        rows = h.permute(0, 2, 3, 1).view(batch, height * width, branches, depth)
        products = [torch.bmm(rows[:, :, n], matrices[:, n]) for n in range(branches)]
        return torch.cat(products, 2).view(batch, height, width, -1).permute(0, 3, 1, 2)
    columns = h.reshape(batch * branches, depth, height * width)
    return torch.bmm(matrices.flatten(0, 1), columns).view_as(h)


@without_autocast
def branch_forms(branch_weight: Tensor, accumulate: torch.dtype) -> Tensor:
    """Returns `Q_n = W_n^T W_n` of (11): `[N, C, D]` to `[N, D, D]`."""
    weight = branch_weight.to(accumulate)
    return torch.bmm(weight.transpose(1, 2), weight)


@without_autocast
def energies_and_grams(
    h: Tensor, branch_weight: Tensor, keep_mask: Tensor | None, form: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `E [B, N]`, (10) and (11), in the dtype of `h`, and the Grams `[B, N, D, D]`.

    Args:
        h: `[B, N*D, H, W]` in the accumulation dtype.
        branch_weight: `[N, C, D]`.
        keep_mask: branch removal, (10), `[B, N]`.
        form: `Q_n [N, D, D]`, where the energies are not those of `branch_weight` itself.
    """
    branches, out_channels, _ = branch_weight.shape
    grams = branch_grams(h, branches)
    form = branch_forms(branch_weight, h.dtype) if form is None else form.to(h.dtype)
    # The form and the Gram are positive semidefinite; rounding must not make it negative. einsum
    # leaves the batch in a stride, where torch.compile would look for its size.
    energy = torch.einsum("bnij,nij->bn", grams, form).clamp_min(0).contiguous()
    energy = energy / (out_channels * h.shape[2] * h.shape[3])
    return (energy if keep_mask is None else energy * keep_mask), grams


@without_autocast
def energy_gradients(
    grad_energy: Tensor,
    h: Tensor,
    branch_weight: Tensor,
    grams: Tensor,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what `dE [B, N]` adds to (16) and (17): gradients of `h` and of `branch_weight`.

    A `form` that was given to `energies_and_grams` is a constant, and so is the weight then.
    """
    out_channels = branch_weight.shape[1]
    coefficient = grad_energy * (2.0 / (out_channels * h.shape[2] * h.shape[3]))
    matrices = branch_forms(branch_weight, h.dtype) if form is None else form.to(h.dtype)
    grad_h = apply_per_branch(coefficient[:, :, None, None] * matrices, h)
    if form is not None:
        return grad_h, torch.zeros_like(branch_weight, dtype=h.dtype)
    weighted = torch.einsum("bn,bnij->nij", coefficient, grams)
    return grad_h, torch.bmm(branch_weight.to(h.dtype), weighted)


class Normalized(NamedTuple):
    """What `normalize` returns; all but `scaled` are in the accumulation dtype."""

    scaled: Tensor
    """`s h`, like `h`."""
    energies: Tensor
    """`Ebar [B, N]`, or `E` where nothing is normalised."""
    inverse: Tensor
    """`1/M [B, 1]`: 0 for a dead sample, 1 where nothing is normalised."""
    scale: Tensor
    """`s [B, N]`, or `[B, 1]` where all branches share one."""
    grams: Tensor
    """`[B, N, D, D]`."""


def inverse_mean(energy: Tensor, branches_of_whole: int | None = None) -> Tensor:
    """Returns `1/M` of (3), `[B, N]` to `[B, 1]`; it is 0 for a dead sample.

    Args:
        energy: of the branches that are there.
        branches_of_whole: the number of branches that the mean is over, where some were cut out;
            None for those of `energy`.
    """
    mean = energy.sum(1, keepdim=True) / (branches_of_whole or energy.shape[1])
    dead = is_dead(mean)
    return torch.where(dead, 0.0, 1.0 / torch.where(dead, 1.0, mean))


def normalize(
    h: Tensor,
    branch_weight: Tensor,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
    *,
    branches_of_whole: int | None = None,
    normalize: bool = True,
    form: Tensor | None = None,
) -> Normalized:
    """Computes (2)-(5) and (10)-(12) up to the convolution.

    Args:
        h: `[B, N*D, H, W]`.
        branch_weight: `[N, C, D]`.
        drop_mask, keep_mask: (5) and (10), `[B, N]`, in the accumulation dtype.
        branches_of_whole: as for `inverse_mean`.
        normalize: whether to divide by `M`, (3)-(4); False is an ablation.
        form: as for `energies_and_grams`.
    """
    wide = h.to(accumulation_dtype(h.dtype))
    energy, grams = energies_and_grams(wide, branch_weight, keep_mask, form)
    inverse = (
        inverse_mean(energy, branches_of_whole) if normalize else torch.ones_like(energy[:, :1])
    )
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
    *,
    branches_of_whole: int | None = None,
    normalize: bool = True,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (13)-(17) without the part of `dW` that the convolution computes.

    Returns:
        The gradients of `h` and of `branch_weight`, in the accumulation dtype.
    """
    branches, _, depth = branch_weight.shape
    accumulate = forward.energies.dtype
    grad = grad_scaled.to(accumulate)
    grad_energy = grad_energies * forward.inverse
    if normalize:
        # (13), (14): sum_n m ds / sqrt(M) is the inner product of s h with its gradient.
        through_scale = (forward.scaled * grad).sum((1, 2, 3))[:, None]
        through_energies = (grad_energies * forward.energies).sum(1, keepdim=True)
        grad_mean = -forward.inverse * (0.5 * through_scale + through_energies)
        grad_energy = grad_energy + grad_mean / (branches_of_whole or branches)
    if keep_mask is not None:
        grad_energy = grad_energy * keep_mask
    grad_h, grad_weight = energy_gradients(
        grad_energy, h.to(accumulate), branch_weight, forward.grams, form
    )
    return grad_h.addcmul(grad, _per_channel(forward.scale, depth)), grad_weight


class _NormalizeBranches(torch.autograd.Function):
    """Maps `(h, W)` to `(s h, Ebar)`, with the gradients (14)-(17) written out.

    Kept for the backward pass: `h`, `s h` (which the convolution behind keeps anyway), the Grams
    and other tensors of size `B*N`. The gradient of `W` through the convolution is not ours. A
    backward pass that is to be differentiated itself computes the forward one again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        branch_weight: Tensor,
        drop_mask: Tensor | None,
        keep_mask: Tensor | None,
        branches_of_whole: int | None,
        normalized: bool,
        form: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = {"branches_of_whole": branches_of_whole, "normalize": normalized}
        result = normalize(h, branch_weight, drop_mask, keep_mask, form=form, **ctx.settings)
        ctx.save_for_backward(h, branch_weight, drop_mask, keep_mask, form, *result)
        return result.scaled, result.energies

    @staticmethod
    def backward(ctx: Any, grad_scaled: Tensor, grad_energies: Tensor) -> tuple[Tensor | None, ...]:
        h, branch_weight, drop_mask, keep_mask, form, *saved = ctx.saved_tensors
        forward = Normalized(*saved)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The results above are constants to whoever differentiates this.
            forward = normalize(h, branch_weight, drop_mask, keep_mask, form=form, **ctx.settings)
        grad_h, grad_weight = normalize_backward(
            grad_scaled,
            grad_energies,
            h,
            branch_weight,
            forward,
            keep_mask,
            form=form,
            **ctx.settings,
        )
        no_gradients = (None,) * 5
        return grad_h.to(h.dtype), grad_weight.to(branch_weight.dtype), *no_gradients


def _per_channel(scale: Tensor, depth: int) -> Tensor:
    """Returns `[B, N]`, or `[B, 1]` where all branches share one, broadcast over `[B, N*D, H,
    W]`."""
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(depth, 1)
    return scale[:, :, None, None]


def normalized_branches(
    h: Tensor,
    branch_weight: Tensor,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    *,
    branches_of_whole: int | None = None,
    divided: bool = True,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes energies, normalisation and DropSubNNs by (11)-(12), up to the convolution.

    Reverse mode, once or twice, has its gradients written out; transforms of `torch.func`,
    forward mode and `torch.jit.trace`, which counts operations for some tools, see plain ones.

    Args:
        h: `[B, N*D, H, W]`, contiguous or channels-last; other layouts are copied.
        branch_weight: `[N, C, D]`, see `split_weight`.
        drop_mask, keep_mask: as for the reference, in the accumulation dtype.
        branches_of_whole, form: as for `gram.normalize`.
        divided: its option `normalize`.

    Returns:
        `s h`, whose 1x1 convolution is the branch sum, and the normalised energies `[B, N]`.
        Without normalisation these are `E`, (2), which nothing bounds; the coding loss (7) then
        asks for `r E = 1` of active branches.
    """
    if not (h.is_contiguous() or _is_channels_last(h)):
        h = h.contiguous()
    tensors = (h, branch_weight, drop_mask, keep_mask)
    counted = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if counted or transformed(h, branch_weight):
        result = normalize(
            *tensors, branches_of_whole=branches_of_whole, normalize=divided, form=form
        )
        return result.scaled, result.energies
    scaled, energies = _NormalizeBranches.apply(*tensors, branches_of_whole, divided, form)
    return scaled, energies


def split_weight(weight: Tensor, branches: int, *, concatenate: bool) -> Tensor:
    """Returns one matrix per branch, `[N, C, D]` (`[N, C/N, D]` when concatenated), a view."""
    if concatenate:
        return weight.reshape(branches, -1, weight.shape[1])
    return weight.reshape(weight.shape[0], branches, -1).transpose(0, 1)
