"""The public coded operations: branch energies (2)-(4) and the sum over branches (6)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coded_resnext.kernels import affine, layout
from coded_resnext.kernels.backend import _LOG, Backend, select_backend
from coded_resnext.kernels.checks import (
    Aggregation,
    check_affine,
    check_aggregate,
    check_debug,
    check_device,
    checked_mask,
)

from . import gram
from . import launch as coded_launch
from . import reference as coded_reference


def _select_for(h: Tensor, width: int, backend: Backend) -> str:
    """The backend for activations; what the kernels do not take goes to `torch`."""
    chosen = select_backend(backend)
    if chosen != "triton":
        return "torch" if chosen == "fused" else chosen
    if not h.is_cuda and not layout.interpreted():
        raise RuntimeError(f"backend: 'triton' was asked for but h is on {h.device}")
    reason = coded_launch.unsupported(h, width)
    if reason is None:
        return chosen
    if not torch.compiler.is_compiling():
        _log_fallback(reason)
    return "torch"


@cache
def _log_fallback(reason: str) -> None:
    _LOG.warning("backend 'torch' runs in place of 'triton': %s", reason)


def coded_aggregate(
    h: Tensor,
    weight: Tensor,
    branches: int,
    *,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    aggregation: Aggregation = "sum",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """What makes a block coded: branch energies, normalisation and branch sum, (1)-(6).

    Args:
        h: activations of all branches, `[B, N*D, H, W]`, floating point, `B >= 1`.
        weight: expand convolution, `[C, N*D, 1, 1]`; `[C, D, 1, 1]` for `aggregation="concat"`.
        branches: number of branches `N`.
        drop_mask: DropSubNNs, (5), `[B, N]`; scales a branch after the energies were taken.
        keep_mask: branch removal, (10), `[B, N]` of 0/1 or booleans; before they are taken.
        aggregation: `"sum"`, or `"concat"`, the ablation in which branch `n` writes channels
            `n*C/N .. (n+1)*C/N`.
        backend: see the module.

    Returns:
        `y [B, C, H, W]` in the dtype of the convolution, and the normalised energies
        `Ebar [B, N]` in float32 (float64 for float64 input). `sum_n Ebar = N`, or 0 for a
        sample in which every remaining branch is dead; its `y` and gradients are 0 too.

    Raises:
        ValueError: an argument has the wrong rank, size, type or device; the message names it.
            With CODED_RESNEXT_DEBUG=1 also numbers that are not finite.
        RuntimeError: the requested backend cannot run.
    """
    concatenate = check_aggregate(h, weight, branches, aggregation)
    chosen = _select_for(h, h.shape[1] // branches, backend)
    accumulate = layout.accumulation_dtype(h.dtype)
    drop_mask = checked_mask("drop_mask", drop_mask, h, branches, accumulate)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    check_debug(h=h, weight=weight)
    if chosen == "torch":
        return gram.coded_aggregate(
            h, weight, branches, drop_mask, keep_mask, concatenate=concatenate
        )
    per_branch = gram.split_weight(weight, branches, concatenate=concatenate)
    if chosen == "reference":
        return coded_reference.coded_aggregate(
            h, per_branch, drop_mask, keep_mask, concatenate=concatenate
        )
    from .operator import normalize_branches

    scaled, energies, _ = normalize_branches(h, per_branch, None, None, drop_mask, keep_mask)
    return F.conv2d(scaled, weight, groups=branches if concatenate else 1), energies


def branch_energy(
    h: Tensor,
    weight: Tensor,
    branches: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    keep_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Branch energies (2), not normalised, without the branch outputs.

    Args:
        h: `[B, N*D, H, W]`; with `scale` and `bias`, what stands before their affine map and ReLU.
        weight: expand convolution, `[C, N*D, 1, 1]`.
        branches: number of branches `N`.
        scale, bias: the affine map of BatchNorm, `[N*D]`, both or neither: energies are those of
            `relu(scale h + bias)`, and both have gradients.
        keep_mask: branch removal, (10), `[B, N]`.
        backend: see the module; `reference` forms the branch outputs.

    Returns:
        `E [B, N]` in float32, float64 for float64.

    Raises:
        ValueError, RuntimeError: as `coded_aggregate`.
    """
    check_aggregate(h, weight, branches, "sum")
    chosen = _select_for(h, h.shape[1] // branches, backend)
    accumulate = layout.accumulation_dtype(h.dtype)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    scale, bias = check_affine(h, scale, bias, accumulate)
    check_debug(h=h, weight=weight)
    per_branch = gram.split_weight(weight, branches, concatenate=False)
    if chosen == "triton":
        from . import operator as coded_operator

        energies: Tensor = coded_operator.branch_energy(h, per_branch, scale, bias, keep_mask)
        return energies
    activated = affine.activate(h, scale, bias).to(accumulate)
    if chosen == "reference":
        energy = coded_reference.branch_energy(activated, per_branch.to(accumulate))
        return energy if keep_mask is None else energy * keep_mask
    return gram.energies_and_grams(activated, per_branch, keep_mask)[0]


class Expanded(NamedTuple):
    """What `coded_expand` returns."""

    y: Tensor
    """`[B, C, H, W]` in the dtype of `h`."""
    moments: Tensor | None
    """Sums of `y` and of `y^2` over the pixels, `[2, B, C]`."""
    energies: Tensor | None
    """Energies (2), `[B, N]`."""


def coded_expand(
    h: Tensor,
    weight: Tensor,
    branches: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    factor: Tensor | None = None,
    moments: bool = False,
    energies: bool = False,
    energies_from_tiles: bool = False,
    backend: Backend = "auto",
) -> Expanded:
    """The branch sum `y[b] = factor[b] sum_n drop keep W_n h_n` as one matrix product.

    Args:
        h, weight, branches, scale, bias, keep_mask, backend: as for `branch_energy`.
        drop_mask: DropSubNNs, (5), `[B, N]`; the energies do not see it.
        factor: scale of a sample, `[B]`: `1 / sqrt(M)` where it is known.
        moments: also return sums of `y` and `y^2`, from which follow BatchNorm's statistics of
            `factor y` for a `factor` that is applied later; not together with `factor`.
        energies: also return the energies.
        energies_from_tiles: take them inside the product where branches tile its blocks, rather
            than in a launch of their own.

    Raises:
        ValueError, RuntimeError: as `coded_aggregate`.
    """
    check_aggregate(h, weight, branches, "sum")
    if moments and factor is not None:
        raise ValueError("factor: expected None with moments, which are those of the unscaled sum")
    accumulate = layout.accumulation_dtype(h.dtype)
    scale, bias = check_affine(h, scale, bias, accumulate)
    drop_mask = checked_mask("drop_mask", drop_mask, h, branches, accumulate)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    if factor is not None:
        if factor.shape != (h.shape[0],):
            raise ValueError(f"factor: expected [{h.shape[0]}], got {list(factor.shape)}")
        check_device("factor", factor, h)
        factor = factor.to(accumulate)
    check_debug(h=h, weight=weight)
    if _select_for(h, h.shape[1] // branches, backend) == "triton":
        from . import expand

        y, sums, energy = expand.coded_expand(
            h,
            weight[:, :, 0, 0],
            branches,
            scale,
            bias,
            drop_mask,
            keep_mask,
            factor,
            moments,
            energies,
            energies_from_tiles,
        )
        return Expanded(y, sums if moments else None, energy if energies else None)
    activated = affine.activate(h, scale, bias).to(accumulate)
    wide = weight.to(accumulate)
    masked = activated
    for mask in (drop_mask, keep_mask):
        if mask is not None:
            masked = masked * mask.repeat_interleave(h.shape[1] // branches, 1)[:, :, None, None]
    y = F.conv2d(masked, wide)
    sums = torch.stack([y.sum((2, 3)), y.square().sum((2, 3))]) if moments else None
    energy = None
    if energies:
        energy = branch_energy(activated, wide, branches, keep_mask=keep_mask, backend="torch")
    if factor is not None:
        y = y * factor[:, None, None, None]
    return Expanded(y.to(h.dtype), sums, energy)
