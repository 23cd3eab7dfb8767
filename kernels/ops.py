"""The public coded operations: validation, and the one rule that picks an implementation.

Backends:
    `reference`  the unfused definition; any floating dtype; for checks.
    `torch`      the exact Gram form in plain PyTorch; every device.
    `fused`      for a block the fused data flow (coded_resnext/fused.py), each of its operators by
                 kernels where they have been seen to win and by PyTorch elsewhere; every device.
                 For an operation alone, `torch`.
    `triton`     the kernels, for a block in the fused data flow, on CUDA devices; on CPU tensors in
                 Triton's interpreter.
    `auto`       `torch`: no measurement on a GPU has shown yet where the kernels win.

The environment variable CODED_RESNEXT_BACKEND replaces `auto`; an explicit argument wins over it.
What the kernels do not take (float64, branches wider than 64 channels) runs as `torch` does, and is
logged once for each reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gram, launch, reference
from .checks import (
    Aggregation,
    check_affine,
    check_aggregate,
    check_debug,
    check_device,
    check_finite,
    check_loss,
    check_targets,
    checked_mask,
)

Backend = Literal["auto", "reference", "torch", "fused", "triton"]

BACKEND_VARIABLE = "CODED_RESNEXT_BACKEND"
_LOG = logging.getLogger("coded_resnext")


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None if it can."""
    reason = None
    if not launch.HAS_TRITON:
        reason = "Triton is not installed"
    elif not torch.cuda.is_available() and not launch.interpreted():
        reason = "no CUDA device was found (on a CPU: TRITON_INTERPRET=1, for checks only)"
    return {"reference": None, "torch": None, "fused": None, "triton": reason}


def select_backend(backend: Backend = "auto") -> str:
    """The backend that runs for a request, `auto` resolved.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend was asked for by name and cannot run here.
    """
    requested = requested_backend(backend)
    return "torch" if requested == "auto" else requested


def check_backend(backend: Backend, device: str | torch.device | None = None) -> None:
    """For commands, which say in one sentence what about their input is at fault.

    Args:
        backend: that was asked for.
        device: that the network will be on, where this is known.

    Raises:
        ValueError: no such backend, or it cannot run here or on this device.
    """
    try:
        requested = requested_backend(backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    on_gpu = device is None or torch.device(device).type == "cuda"
    if requested == "triton" and not (on_gpu or launch.interpreted()):
        raise ValueError(
            f"backend: 'triton' was asked for but its kernels do not run on the device {device}; "
            "choose a GPU, or another backend"
        )


def requested_backend(backend: Backend) -> str:
    """As `select_backend`, with `auto` where neither the call nor the environment names one."""
    source = "backend"
    requested: str = backend
    if requested == "auto":
        source = BACKEND_VARIABLE
        requested = os.environ.get(BACKEND_VARIABLE, "auto")
    if requested not in get_args(Backend):
        expected = ", ".join(get_args(Backend))
        raise ValueError(f"{source}: expected one of {expected}; got {requested!r}")
    if requested != "triton":
        return requested
    reason = backends()[requested]
    if reason is not None:
        raise RuntimeError(f"{source}: {requested!r} was asked for but cannot run: {reason}")
    return requested


def _select_for(h: Tensor, width: int, backend: Backend) -> str:
    """The backend for activations; what the kernels do not take goes to `torch`."""
    chosen = select_backend(backend)
    if chosen != "triton":
        return "torch" if chosen == "fused" else chosen
    if not h.is_cuda and not launch.interpreted():
        raise RuntimeError(f"backend: 'triton' was asked for but h is on {h.device}")
    reason = launch.unsupported(h, width)
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
    accumulate = reference.accumulation_dtype(h.dtype)
    drop_mask = checked_mask("drop_mask", drop_mask, h, branches, accumulate)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    check_debug(h=h, weight=weight)
    if chosen == "torch":
        return gram.coded_aggregate(
            h, weight, branches, drop_mask, keep_mask, concatenate=concatenate
        )
    per_branch = gram.split_weight(weight, branches, concatenate=concatenate)
    if chosen == "reference":
        return reference.coded_aggregate(
            h, per_branch, drop_mask, keep_mask, concatenate=concatenate
        )
    from .operators import normalize_branches

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
    accumulate = reference.accumulation_dtype(h.dtype)
    keep_mask = checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    scale, bias = check_affine(h, scale, bias, accumulate)
    check_debug(h=h, weight=weight)
    per_branch = gram.split_weight(weight, branches, concatenate=False)
    if chosen == "triton":
        from . import operators

        energies: Tensor = operators.branch_energy(h, per_branch, scale, bias, keep_mask)
        return energies
    activated = gram.activate(h, scale, bias).to(accumulate)
    if chosen == "reference":
        energy = reference.branch_energy(activated, per_branch.to(accumulate))
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
    accumulate = reference.accumulation_dtype(h.dtype)
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
        from . import expand_operator

        y, sums, energy = expand_operator.coded_expand(
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
    activated = gram.activate(h, scale, bias).to(accumulate)
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


def coding_loss(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    *,
    exponent: float = 4.0,
    threshold: float = 0.0,
    check_values: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Coding loss of one block, (7): how far the branch energies are from the codewords.

    Args:
        energies: normalised energies `[B, N]`.
        codewords: `[K, N]`, boolean, rows of equal weight.
        targets: class indices `[B]`, or class probabilities `[B, K]`.
        exponent: `q >= 1`; the paper uses 4.
        threshold: `t >= 0`; deviations up to it cost nothing.
        check_values: refuse energies on the CPU that are not finite.
        backend: see the module.

    Returns:
        A scalar in the dtype of the energies (float32 at least).

    Raises:
        ValueError: wrong shapes or numbers; on CPU tensors also targets outside `0 .. K-1` and
            energies that are not finite. Values on other devices are not read: that would make
            the host wait for the device.
    """
    losses = coding_losses(
        [energies],
        [codewords],
        targets,
        exponent=exponent,
        threshold=threshold,
        check_values=check_values,
        backend=backend,
    )
    return losses.losses[0]


class CodingLosses(NamedTuple):
    """What `coding_losses` returns, in the order of the blocks."""

    losses: tuple[Tensor, ...]
    """Scalars."""
    decoded: tuple[Tensor, ...] | None
    """Classes `[B]`."""


def coding_losses(
    energies: Sequence[Tensor],
    codewords: Sequence[Tensor],
    targets: Tensor,
    *,
    exponent: float = 4.0,
    threshold: float = 0.0,
    decode: bool = False,
    check_values: bool = True,
    backend: Backend = "auto",
) -> CodingLosses:
    """`coding_loss` of several blocks; by the kernels in one launch for blocks of equal sizes.

    Args:
        energies, codewords: one tensor for each block.
        decode: also read the classes off the energies, (9); ties go to the lowest class.
        targets, exponent, threshold, check_values, backend: as for `coding_loss`.

    Raises:
        ValueError: as `coding_loss`.
    """
    for values, book in zip(energies, codewords, strict=True):
        check_loss(values, book, exponent, threshold)
        if check_values:
            check_finite("energies", values)
        check_targets(targets, values.shape[0], book.shape[0])
        check_device("codewords", book, values)
    triton = select_backend(backend) == "triton" and _kernel_takes_loss(energies, targets)
    if not triton:
        losses = tuple(
            reference.coding_loss(values, book, targets, exponent, threshold)
            for values, book in zip(energies, codewords, strict=True)
        )
        if not decode:
            return CodingLosses(losses, None)
        # Autocast would round the energies to half precision and make ties.
        with torch.autocast(targets.device.type, enabled=False):
            scores = [v @ c.to(v.dtype).T for v, c in zip(energies, codewords, strict=True)]
        return CodingLosses(losses, tuple(score.argmax(1) for score in scores))
    from . import loss_operator

    # Blocks of equal sizes share a launch.
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for index, (values, book) in enumerate(zip(energies, codewords, strict=True)):
        groups.setdefault((values.shape, book.shape), []).append(index)
    found: dict[int, Tensor] = {}
    classes: dict[int, Tensor] = {}
    for members in groups.values():
        losses_of_group, _, decoded = loss_operator.coding_loss(
            torch.stack([energies[i].float() for i in members]),
            torch.stack([codewords[i].bool() for i in members]),
            targets,
            float(exponent),
            float(threshold),
            decode,
        )
        found.update(zip(members, losses_of_group.unbind(), strict=True))
        if decode:
            classes.update(zip(members, decoded.unbind(), strict=True))
    order = range(len(energies))
    return CodingLosses(
        tuple(found[i] for i in order), tuple(classes[i] for i in order) if decode else None
    )


def _kernel_takes_loss(energies: Sequence[Tensor], targets: Tensor) -> bool:
    """Whether the loss kernel computes these; float64 and trained targets are PyTorch's."""
    double = any(values.dtype == torch.float64 for values in energies)
    on_device = all(values.is_cuda or launch.interpreted() for values in energies)
    return on_device and not double and not targets.requires_grad
