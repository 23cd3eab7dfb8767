"""The coding loss of all blocks as the PyTorch operator `coded_resnext::coding_loss`.

L blocks, B samples, N branches, K classes. Values, gradients and, on request, the decoded classes
come from one launch; elsewhere than on CUDA tensors and in Triton's interpreter, from PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels.checks import check_filled, is_no_class, refuse_derivative
from coded_resnext.kernels.layout import interpreted, on_device, operator, without_autocast

from . import rows as loss_rows


@operator("coding_loss")
def coding_loss(
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
    [B]`, those of the samples in the mean, see `reference.sample_shares`. A target that is no class
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


coding_loss.register_autograd(_gradients, setup_context=_save)
