"""The public coded operations: branch energies (2)-(4) and the sum over branches (6)."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from coded_resnext.kernels import affine, layout
from coded_resnext.kernels.backend import LOGGER, Backend, say_once, select_backend
from coded_resnext.kernels.checks import (
    Aggregation,
    check_affine,
    check_aggregate,
    check_debug,
    check_kernels_differentiate,
    checked_mask,
)

from . import gram
from . import operator as coded_operator
from . import reference as coded_reference


def _select_for(h: Tensor, width: int, backend: Backend) -> str:
    """Returns the backend for activations; what the kernels do not take goes to `torch`."""
    chosen = select_backend(backend)
    if chosen != "triton":
        return "torch" if chosen == "fused" else chosen
    if not h.is_cuda and not layout.interpreted():
        raise RuntimeError(f"backend: 'triton' was asked for but h is on {h.device}")
    reason = coded_operator.unsupported(h, width)
    if reason is None:
        return chosen
    say_once(LOGGER, f"backend 'torch' runs instead of 'triton': {reason}", logging.WARNING)
    return "torch"


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
    """Normalises branch energies and sums the branches, (1)-(6): what makes a block coded.

    Args:
        h: activations of all branches, `[B, N*D, H, W]`, floating point, `B >= 1`.
        weight: expand convolution, `[C, N*D, 1, 1]`; `[C, D, 1, 1]` for `aggregation="concat"`.
        branches: number of branches `N`.
        drop_mask: DropSubNNs, (5), `[B, N]`; scales a branch after the energies were taken.
        keep_mask: branch removal, (10), `[B, N]` of 0/1 or booleans; before they are taken.
        aggregation: `"sum"`, or `"concat"`, the ablation in which branch `n` writes channels
            `n*C/N .. (n+1)*C/N`.
        backend: see kernels/backend.py.

    Returns:
        `y [B, C, H, W]` in the dtype of the convolution, and the normalised energies
        `Ebar [B, N]` in float32 (float64 for float64 input). `sum_n Ebar = N`, or 0 for a
        sample in which every remaining branch is dead; its `y` and gradients are 0 too.

    Raises:
        ValueError: an argument has the wrong rank, size, type or device; the message names it.
            With CODED_RESNEXT_DEBUG=1 also numbers that are not finite.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: the kernels were to be differentiated by `torch.func`, in forward mode,
            or twice.
    """
    check_aggregate(h, weight, branches, aggregation)
    if _select_for(h, h.shape[1] // branches, backend) != "reference":
        scaled, energies = normalized_branches(
            h,
            weight,
            branches,
            drop_mask=drop_mask,
            keep_mask=keep_mask,
            aggregation=aggregation,
            backend=backend,
        )
        return _branch_sum(scaled, weight, branches, aggregation), energies
    concatenate, drop_mask, keep_mask = _checked(
        h, weight, branches, aggregation, drop_mask, keep_mask
    )
    per_branch = gram.split_weight(weight, branches, concatenate=concatenate)
    return coded_reference.coded_aggregate(
        h, per_branch, drop_mask, keep_mask, concatenate=concatenate
    )


def _branch_sum(h: Tensor, weight: Tensor, branches: int, aggregation: Aggregation) -> Tensor:
    """Returns the 1x1 convolution behind `normalized_branches`, channels-last.

    As a matrix product: in float32 it is exact unless PyTorch's matrix products may take TF32, as
    its convolutions do by default.
    """
    rows = h.permute(0, 2, 3, 1)
    if aggregation == "concat":
        per_branch = gram.split_weight(weight, branches, concatenate=True)
        columns = rows.reshape(*rows.shape[:3], *per_branch.shape[::2])
        outputs = torch.einsum("bhwnd,ncd->bhwnc", columns, per_branch)
        return outputs.flatten(3).permute(0, 3, 1, 2)
    return F.linear(rows, weight[:, :, 0, 0]).permute(0, 3, 1, 2)


def normalized_branches(
    h: Tensor,
    weight: Tensor,
    branches: int,
    *,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    aggregation: Aggregation = "sum",
    backend: Backend = "auto",
    branches_of_whole: int | None = None,
    normalize: bool = True,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what the convolution of `coded_aggregate` takes, for a caller with its own layer.

    Args:
        h, weight, branches, drop_mask, keep_mask, aggregation: as for `coded_aggregate`.
        backend: the same; `reference` has no such intermediate result, and `torch` runs.
        branches_of_whole, normalize, form: as for `gram.normalize`; kernels take none of them.

    Returns:
        `s h [B, N*D, H, W]` and the normalised energies `[B, N]`.

    Raises:
        ValueError, RuntimeError: as `coded_aggregate`.
    """
    concatenate, drop_mask, keep_mask = _checked(
        h, weight, branches, aggregation, drop_mask, keep_mask
    )
    per_branch = gram.split_weight(weight, branches, concatenate=concatenate)
    whole = branches_of_whole in (None, branches) and normalize and form is None
    if whole and _select_for(h, h.shape[1] // branches, backend) == "triton":
        check_kernels_differentiate(h, weight)
        scaled, energies, _ = coded_operator.normalize_branches(
            h, per_branch, None, None, drop_mask, keep_mask
        )
        return scaled, energies
    return gram.normalized_branches(
        h,
        per_branch,
        drop_mask,
        keep_mask,
        branches_of_whole=branches_of_whole,
        divided=normalize,
        form=form,
    )


def _checked(
    h: Tensor,
    weight: Tensor,
    branches: int,
    aggregation: Aggregation,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
) -> tuple[bool, Tensor | None, Tensor | None]:
    """Checks arguments; returns whether branches are concatenated, and the masks."""
    concatenate = check_aggregate(h, weight, branches, aggregation)
    accumulate = layout.accumulation_dtype(h.dtype)
    drop_mask = checked_mask("drop_mask", drop_mask, h, branches, accumulate)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    check_debug(h=h, weight=weight)
    return concatenate, drop_mask, keep_mask


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
    """Returns the branch energies (2), not normalised, without the branch outputs.

    Args:
        h: `[B, N*D, H, W]`; with `scale` and `bias`, what stands before their affine map and ReLU.
        weight: expand convolution, `[C, N*D, 1, 1]`.
        branches: number of branches `N`.
        scale: of the affine map of BatchNorm, `[N*D]`; energies are of `relu(scale h + bias)`.
        bias: of that map, `[N*D]`; both or neither are given, and both have gradients.
        keep_mask: branch removal, (10), `[B, N]`.
        backend: see kernels/backend.py; `reference` forms the branch outputs.

    Returns:
        `E [B, N]` in float32, float64 for float64.

    Raises:
        ValueError, RuntimeError: as `coded_aggregate`.
    """
    check_aggregate(h, weight, branches, "sum")
    chosen = _select_for(h, h.shape[1] // branches, backend)
    accumulate = layout.accumulation_dtype(h.dtype)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    check_affine(h, scale, bias)
    scale, bias = (v if v is None else v.to(accumulate) for v in (scale, bias))
    check_debug(h=h, weight=weight)
    per_branch = gram.split_weight(weight, branches, concatenate=False)
    if chosen == "triton":
        check_kernels_differentiate(h, weight)
        energies: Tensor = coded_operator.branch_energy(h, per_branch, scale, bias, keep_mask)
        return energies
    activated = affine.activate(h, scale, bias).to(accumulate)
    if chosen == "reference":
        energy = coded_reference.branch_energy(activated, per_branch.to(accumulate))
        return energy if keep_mask is None else energy * keep_mask
    return gram.normalized_branches(activated, per_branch, None, keep_mask, divided=False)[1]
