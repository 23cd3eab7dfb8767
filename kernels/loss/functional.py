"""The coding loss (7) and early decoding (9) of one block or of all blocks of a network.

The public functions choose who computes. The PyTorch operator `coded_resnext::coding_loss` is the
Triton kernel's: values, gradients and, on request, the decoded classes come from one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_resnext.kernels.backend import Backend, select_backend
from coded_resnext.kernels.checks import (
    check_class_weight,
    check_device,
    check_filled,
    check_finite,
    check_kernels_differentiate,
    check_loss,
    check_targets,
    is_no_class,
    refuse_derivative,
)
from coded_resnext.kernels.layout import (
    accumulation_dtype,
    interpreted,
    on_device,
    operator,
    without_autocast,
)

from . import reference as loss_reference
from . import rows as loss_rows

# Branches whose products with 64 codewords fit into 48 KiB of shared memory, which every GPU has.
WIDEST = 128


def coding_loss(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    *,
    exponent: float = 4.0,
    threshold: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    check_values: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Returns the coding loss of one block, (7): how far its energies are from the codewords.

    Args:
        energies: normalised energies `[B, N]`.
        codewords: `[K, N]`, boolean, rows of equal weight.
        targets: class indices `[B]`, or class probabilities `[B, K]`.
        exponent: `q >= 1`; the paper uses 4.
        threshold: `t >= 0`; deviations up to it cost nothing.
        class_weight: `[K]`; samples then count as in `F.cross_entropy` with this `weight`.
        ignore_index: the class index of samples without a label, which are left out.
        check_values: refuse energies on the CPU that are not finite.
        backend: see kernels/backend.py.

    Returns:
        A scalar in the dtype of the energies (float32 at least).

    Raises:
        ValueError: wrong shapes or numbers; on CPU tensors also targets outside `0 .. K-1` and
            energies that are not finite. Values on other devices, and under `torch.compile`, are
            not read, since the host would have to wait: a class out of range makes the loss NaN.
    """
    losses = coding_losses(
        [energies],
        [codewords],
        targets,
        exponent=exponent,
        threshold=threshold,
        class_weight=class_weight,
        ignore_index=ignore_index,
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
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    decode: bool = False,
    check_values: bool = True,
    backend: Backend = "auto",
) -> CodingLosses:
    """Returns the `coding_loss` of several blocks; the kernels launch once for equal sizes.

    Arguments that are not listed are those of `coding_loss`.

    Args:
        energies: one tensor for each block.
        codewords: one tensor for each block.
        decode: also read the classes off the energies, (9); ties go to the lowest class.

    Raises:
        ValueError: as `coding_loss`.
    """
    checked: set[tuple[int, int]] = set()
    equal_shares = class_weight is None
    for values, book in zip(energies, codewords, strict=True):
        check_loss(values, book, exponent, threshold)
        if check_values:
            check_finite("energies", values)
        sizes = (values.shape[0], book.shape[0])
        # The blocks of a network have the same samples and classes, whose values are read once.
        if sizes not in checked:
            equal_shares &= check_targets(targets, *sizes, ignore_index)
            check_class_weight(class_weight, book.shape[0])
            checked.add(sizes)
        check_device("codewords", book, values)
    if not energies:
        return CodingLosses((), () if decode else None)
    triton = select_backend(backend) == "triton" and _kernel_takes_loss(energies, targets)
    shares = None
    if triton or not equal_shares:
        # The blocks of a network have the same classes.
        dtype = accumulation_dtype(energies[0].dtype)
        shares = loss_reference.sample_shares(
            targets, min(map(len, codewords)), dtype, class_weight, ignore_index
        )
    if not triton:
        losses = tuple(
            loss_reference.coding_loss(values, book, targets, shares, exponent, threshold)
            for values, book in zip(energies, codewords, strict=True)
        )
        if not decode:
            return CodingLosses(losses, None)
        scores = map(loss_reference.class_scores, energies, codewords)
        return CodingLosses(losses, tuple(score.argmax(1) for score in scores))
    check_kernels_differentiate(*energies)
    # Blocks of equal sizes share a launch.
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for index, (values, book) in enumerate(zip(energies, codewords, strict=True)):
        groups.setdefault((values.shape, book.shape), []).append(index)
    by_block: dict[int, Tensor] = {}
    classes: dict[int, Tensor] = {}
    for members in groups.values():
        losses_of_group, _, decoded = coding_loss_operator(
            torch.stack([energies[i].float() for i in members]),
            torch.stack([codewords[i].bool() for i in members]),
            targets,
            shares,
            float(exponent),
            float(threshold),
            decode,
        )
        by_block.update(zip(members, losses_of_group.unbind(), strict=True))
        if decode:
            classes.update(zip(members, decoded.unbind(), strict=True))
    order = range(len(energies))
    return CodingLosses(
        tuple(by_block[i] for i in order), tuple(classes[i] for i in order) if decode else None
    )


def _kernel_takes_loss(energies: Sequence[Tensor], targets: Tensor) -> bool:
    """Returns whether the loss kernel computes these; others are PyTorch's.

    That is float64, targets that are trained, and codewords that do not fit into shared memory.
    """
    if any(values.dtype == torch.float64 or values.shape[1] > WIDEST for values in energies):
        return False
    runs_kernels = all(values.is_cuda or interpreted() for values in energies)
    return runs_kernels and not targets.requires_grad


@operator("coding_loss")
def coding_loss_operator(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    shares: Tensor,
    exponent: float,
    threshold: float,
    decode: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(7) and (9) for `energies [L, B, N]` float32 and boolean `codewords [L, K, N]`.

    `targets` are classes `[B]` or probabilities `[B, K]`, and have no gradient; nor have `shares
    [B]`, those of the samples in the mean, see `sample_shares`. A target that is no class
    makes the loss NaN unless its sample has no share.

    Returns:
        The losses `[L]`, their gradients `[L, B, N]`, and the decoded classes `[L, B]`, which are
        empty unless asked for.
    """
    check_filled("energies", energies, "block, sample and branch")
    if not (energies.is_cuda or interpreted()):
        return _in_torch(energies, codewords, targets, shares, exponent, threshold, decode)
    blocks, batch, branches = energies.shape
    classes = codewords.shape[1]
    soft = targets.ndim == 2
    # The kernel is compiled for these, which are constants where a graph leaves sizes open.
    sizes = loss_rows.LossSizes(int(branches), int(classes), soft, float(exponent), decode)
    row = loss_rows.coding_loss(sizes)
    programs = -(-batch // int(dict(row.constexprs)["BLOCK_B"]))
    parts = energies.new_empty((blocks, programs))
    grad = energies.new_empty((blocks, batch, branches))
    decoded = energies.new_empty((blocks, batch) if decode else (0,), dtype=torch.int64)
    with on_device(energies):
        row.launch(
            (programs, blocks),
            parts,
            grad,
            decoded if decode else None,
            energies.contiguous(),
            codewords.contiguous().view(torch.uint8),
            targets.to(torch.float32 if soft else torch.int64).contiguous(),
            shares.float().contiguous(),
            float(threshold),
            batch,
        )
    return parts.sum(1), grad, decoded


@without_autocast
def _in_torch(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    shares: Tensor,
    exponent: float,
    threshold: float,
    decode: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    books = codewords.to(energies.dtype)
    shares = shares.to(energies.dtype)
    if targets.ndim == 1:
        targets = targets.long()
        shares = shares.masked_fill(is_no_class(targets, books.shape[1]) & (shares != 0), torch.nan)
        wanted = books[:, targets.clamp(0, books.shape[1] - 1)]
    else:
        wanted = targets.to(energies.dtype) @ books
    ratio = books[:, :1].mean(2, keepdim=True)
    deviation = ratio * energies - wanted
    excess = (deviation.abs() - threshold).relu().masked_fill((shares == 0)[:, None], 0.0)
    losses = excess.pow(exponent).mean(2) @ shares
    slope = exponent * excess.pow(exponent - 1) * deviation.sign() * ratio
    grad = torch.where(excess == 0, 0.0, slope * shares[:, None]) / energies.shape[2]
    if not decode:
        return losses, grad, torch.empty((0,), dtype=torch.int64, device=energies.device)
    return losses, grad, (energies @ books.transpose(1, 2)).argmax(2)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, grad, decoded = output
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(grad, decoded)
    # Of what has no gradient none is made.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_losses: Tensor | None, *_: Any) -> Any:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # The gradient was computed with the losses: another derivative would take it for constant.
        refuse_derivative()
    if grad_losses is None:
        return (None,) * 7
    (grad,) = ctx.saved_tensors
    return grad * grad_losses[:, None, None], None, None, None, None, None, None


coding_loss_operator.register_autograd(_gradients, setup_context=_save)
