"""The public coded operations: validation, and the one rule that picks an implementation.

Backends:
    `reference`  the unfused definition; any floating dtype; for checks.
    `torch`      the exact Gram form in plain PyTorch; every device.
    `triton`     fused kernels; reserved, not part of this version.
    `auto`       the fastest one that can run: `torch` in this version.

The environment variable CODED_RESNEXT_BACKEND replaces `auto`; an explicit argument wins over it.
"""

from __future__ import annotations

import math
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from . import gram, reference

Backend = Literal["auto", "reference", "torch", "triton"]
Aggregation = Literal["sum", "concat"]

BACKEND_VARIABLE = "CODED_RESNEXT_BACKEND"


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None if it can."""
    return {
        "reference": None,
        "torch": None,
        "triton": "this version ships no Triton kernels",
    }


def select_backend(backend: Backend = "auto") -> str:
    """The backend that runs for a request, `auto` resolved.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend was asked for by name and cannot run here.
    """
    source = "backend"
    requested: str = backend
    if requested == "auto":
        source = BACKEND_VARIABLE
        requested = os.environ.get(BACKEND_VARIABLE, "auto")
    if requested not in get_args(Backend):
        expected = ", ".join(get_args(Backend))
        raise ValueError(f"{source}: expected one of {expected}; got {requested!r}")
    if requested == "auto":
        return "torch"
    reason = backends()[requested]
    if reason is not None:
        raise RuntimeError(f"{source}: {requested!r} was asked for but cannot run: {reason}")
    return requested


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
        ValueError: an argument has the wrong rank, size or type; the message names it.
        RuntimeError: the requested backend cannot run.
    """
    chosen = select_backend(backend)
    concatenate = _check_aggregate(h, weight, branches, aggregation)
    accumulate = reference.accumulation_dtype(h.dtype)
    drop_mask = _checked_mask("drop_mask", drop_mask, h, branches, accumulate)
    keep_mask = _checked_mask("keep_mask", keep_mask, h, branches, accumulate)
    if chosen == "reference":
        per_branch = gram.split_weight(weight, branches, concatenate=concatenate)
        return reference.coded_aggregate(
            h, per_branch, drop_mask, keep_mask, concatenate=concatenate
        )
    return gram.coded_aggregate(h, weight, branches, drop_mask, keep_mask, concatenate=concatenate)


def coding_loss(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    *,
    exponent: float = 4.0,
    threshold: float = 0.0,
    check_values: bool = True,
) -> Tensor:
    """Coding loss of one block, (7): how far the branch energies are from the codewords.

    Args:
        energies: normalised energies `[B, N]`.
        codewords: `[K, N]`, boolean, rows of equal weight.
        targets: class indices `[B]`, or class probabilities `[B, K]`.
        exponent: `q >= 1`; the paper uses 4.
        threshold: `t >= 0`; deviations up to it cost nothing.
        check_values: refuse energies on the CPU that are not finite.

    Returns:
        A scalar in the dtype of the energies (float32 at least).

    Raises:
        ValueError: wrong shapes or numbers; on CPU tensors also targets outside `0 .. K-1` and
            energies that are not finite. Values on other devices are not read: that would make
            the host wait for the device.
    """
    if energies.ndim != 2 or codewords.ndim != 2 or energies.shape[1] != codewords.shape[1]:
        raise ValueError(
            "energies: expected [B, N] for codewords [K, N], got "
            f"{list(energies.shape)} for {list(codewords.shape)}"
        )
    if not (math.isfinite(exponent) and exponent >= 1):
        raise ValueError(f"exponent: expected a number of at least 1, got {exponent}")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    check_targets(targets, energies.shape[0], codewords.shape[0])
    if check_values:
        check_finite("energies", energies)
    return reference.coding_loss(energies, codewords, targets, exponent, threshold)


def check_targets(targets: Tensor, batch: int, classes: int) -> None:
    """Refuse targets that are neither `[B]` class indices in range nor `[B, K]` probabilities.

    Values are read on CPU tensors only, so that a step on an accelerator never waits for them.
    """
    if targets.shape not in ((batch,), (batch, classes)):
        raise ValueError(
            f"targets: expected shape [{batch}] or [{batch}, {classes}], got {list(targets.shape)}"
        )
    if targets.ndim == 2:
        if not targets.is_floating_point():
            raise ValueError(f"targets: expected floating-point probabilities, got {targets.dtype}")
        check_finite("targets", targets)
        return
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"targets: expected integer class indices, got {targets.dtype}")
    if _readable(targets) and batch > 0:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"targets: expected classes 0 to {classes - 1}, got {wrong}")


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity in a CPU tensor, with the argument's name."""
    if _readable(value) and not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _readable(value: Tensor) -> bool:
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_aggregate(h: Tensor, weight: Tensor, branches: int, aggregation: str) -> bool:
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation: expected 'sum' or 'concat', got {aggregation!r}")
    if h.ndim != 4 or not h.is_floating_point():
        raise ValueError(
            f"h: expected a floating-point tensor [B, N*D, H, W], got {h.dtype} {list(h.shape)}"
        )
    if 0 in h.shape:
        raise ValueError(f"h: expected at least one sample, channel and pixel, got {list(h.shape)}")
    channels = h.shape[1]
    if branches < 1 or channels % branches:
        raise ValueError(f"branches: expected a divisor of {channels} channels, got {branches}")
    concatenate = aggregation == "concat"
    width = channels // branches if concatenate else channels
    if weight.ndim != 4 or weight.shape[1:] != (width, 1, 1):
        raise ValueError(f"weight: expected [C, {width}, 1, 1], got {list(weight.shape)}")
    if concatenate and weight.shape[0] % branches:
        raise ValueError(
            f"weight: expected output channels divisible by {branches} branches, "
            f"got {weight.shape[0]}"
        )
    return concatenate


def _checked_mask(
    name: str, mask: Tensor | None, h: Tensor, branches: int, dtype: torch.dtype
) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != (h.shape[0], branches):
        raise ValueError(f"{name}: expected [{h.shape[0]}, {branches}], got {list(mask.shape)}")
    return mask.to(device=h.device, dtype=dtype)
