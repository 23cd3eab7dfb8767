"""Energies and the coded normalisation as PyTorch operators: schema, fakes and gradients.

On CUDA tensors, and on CPU tensors in Triton's interpreter, the operators `coded_resnext::*` run
their kernels, for which `Launch` prepares tensors and settings; anywhere else, and for sizes or
dtypes that the kernels do not take, the Gram form. Results and gradients that have the size of the
activations are channels-last. Masks are constants.

B samples, N branches of width D, C output channels of a branch, P = H*W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels import affine, layout
from coded_resnext.kernels.affine import behind_activation, split_sums, total
from coded_resnext.kernels.backend import LOGGER, say_once
from coded_resnext.kernels.checks import check_filled, refuse_derivative
from coded_resnext.kernels.layout import (
    accumulation_dtype,
    as_float32,
    as_rows,
    channels_last,
    empty_rows,
    on_device,
    operator,
    variant_of,
    without_autocast,
)
from coded_resnext.kernels.rows import WIDEST_BRANCH, CodedSizes, LaunchRow, Variant, Windows

from . import gram
from . import rows as coded_rows


def unsupported(h: Tensor, width: int) -> str | None:
    """Returns why the kernels do not take these activations `[B, N*D, H, W]`; None if they do."""
    reason = layout.unsupported(h, width=width, widest=WIDEST_BRANCH)
    if reason is None and max(h.numel() // h.shape[0], h.shape[0] * h.shape[1]) >= 2**31:
        return "the kernels take samples, and B*N*D, of fewer than 2^31 elements"
    return reason


class Launch:
    """What the launches of one operator share: sizes, settings and tensors as the kernels read."""

    def __init__(
        self,
        z: Tensor,
        branch_weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        drop_mask: Tensor | None,
        keep_mask: Tensor | None,
        *,
        form: Tensor | None = None,
    ) -> None:
        # Kernels are compiled for these, which are constants where a graph leaves sizes open.
        branches, channels, width = (int(size) for size in branch_weight.shape)
        self.batch, self.pixels = z.shape[0], int(z.shape[2]) * int(z.shape[3])
        self.sizes = CodedSizes(branches, width, channels, self.pixels)
        self.variant = variant_of(
            z, affine=scale is not None, drop=drop_mask is not None, keep=keep_mask is not None
        )
        self.inverse_size = 1.0 / (channels * self.pixels)
        self.rows = as_rows(z)
        self.scale, self.bias = as_float32(scale), as_float32(bias)
        self.drop, self.keep = as_float32(drop_mask), as_float32(keep_mask)
        self.windows = Windows.of(self.sizes).count
        self.form = gram.branch_forms(branch_weight, torch.float32) if form is None else form

    @classmethod
    def of(
        cls,
        z: Tensor,
        branch_weight: Tensor,
        *others: Tensor | None,
        rows: tuple[Callable[[CodedSizes, Variant], LaunchRow], ...],
        form: Tensor | None = None,
    ) -> Launch | None:
        """Returns what the kernels of these rows read, or None where PyTorch runs instead.

        That is so where `unsupported` gives a reason, and, said once in the log, where a kernel
        does not fit onto the GPU.
        """
        if unsupported(z, branch_weight.shape[2]) is not None:
            return None
        launch = cls(z, branch_weight, *others, form=form)
        with on_device(z):
            for row in rows:
                reason = layout.too_large(row(launch.sizes, launch.variant), z.device.index or 0)
                if reason is not None:
                    say_once(LOGGER, f"PyTorch runs instead of a kernel: {reason}", logging.WARNING)
                    return None
        return launch

    def over_windows(self, row: LaunchRow) -> tuple[int, int]:
        """Returns the grid of a kernel over samples and windows."""
        settings = dict(row.constexprs)
        samples, windows = int(settings["SAMPLES"]), int(settings["WINDOWS"])
        return -(-self.batch // samples), -(-self.windows // windows)

    def add_weight_gradient(
        self, coefficient: Tensor, branch_weight: Tensor, gradient: Tensor
    ) -> None:
        """Adds (17) without the part that the convolution computes, to a gradient `[N, C, D]`."""
        row = coded_rows.weighted_gram(self.sizes, self.variant)
        grid = self.over_windows(row)
        branches, width = self.sizes.branches, self.sizes.width
        parts = self.form.new_empty((grid[0], branches, width, width))
        row.launch(grid, parts, self.rows, self.scale, self.bias, coefficient, self.batch)
        _add_product(gradient, branch_weight.to(torch.float32), parts.sum(0))


@without_autocast
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the products of float32 matrices to `total`, rounded to its dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


@operator("branch_energy")
def branch_energy(
    z: Tensor,
    branch_weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    keep_mask: Tensor | None,
) -> Tensor:
    """(2), (10), (11): the energies `E [B, N]` of `relu(scale z + bias)`.

    `z [B, N*D, H, W]`, `branch_weight [N, C, D]`, `scale` and `bias [N*D]`, `keep_mask [B, N]`.
    """
    check_filled("z", z)
    rows = (coded_rows.energy_forward,)
    launch = Launch.of(z, branch_weight, scale, bias, None, keep_mask, rows=rows)
    if launch is None:
        h = affine.activate(z, scale, bias).to(accumulation_dtype(z.dtype))
        return gram.energies_and_grams(h, branch_weight, keep_mask)[0].contiguous()
    energy = launch.form.new_empty((launch.batch, launch.sizes.branches))
    row = coded_rows.energy_forward(launch.sizes, launch.variant)
    with on_device(z):
        row.launch(
            launch.over_windows(row),
            energy,
            launch.rows,
            launch.scale,
            launch.bias,
            launch.form,
            launch.keep,
            launch.inverse_size,
            launch.batch,
        )
    return energy


@operator("branch_energy_backward")
def branch_energy_backward(
    grad_energy: Tensor,
    z: Tensor,
    branch_weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    keep_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `z` and `branch_weight`, and the sums of `behind_activation`."""
    check_filled("z", z)
    if keep_mask is not None:
        grad_energy = grad_energy * keep_mask
    rows = (coded_rows.energy_backward, coded_rows.weighted_gram)
    launch = Launch.of(z, branch_weight, scale, bias, None, None, rows=rows)
    if launch is None:
        h = affine.activate(z, scale, bias).to(grad_energy.dtype)
        grams = gram.branch_grams(h, branch_weight.shape[0])
        grad_h, grad_weight = gram.energy_gradients(grad_energy, h, branch_weight, grams)
        grad_z, sums = behind_activation(grad_h, z, scale, bias)
        return grad_z, grad_weight.to(branch_weight.dtype), total(sums, z)
    coefficient = (grad_energy * (2.0 * launch.inverse_size)).contiguous()
    row = coded_rows.energy_backward(launch.sizes, launch.variant)
    grid = launch.over_windows(row)
    grad = empty_rows(z)
    parts = None if scale is None else coefficient.new_empty((grid[0], 2, z.shape[1]))
    with on_device(z):
        row.launch(
            grid,
            grad,
            parts,
            launch.rows,
            launch.scale,
            launch.bias,
            launch.form,
            coefficient,
            launch.batch,
        )
        grad_weight = torch.zeros_like(branch_weight, memory_format=torch.contiguous_format)
        launch.add_weight_gradient(coefficient, branch_weight, grad_weight)
    return grad.permute(0, 3, 1, 2), grad_weight, total(parts, z)


def _save_for_branch_energy(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _branch_energy_gradients(ctx: Any, grad_energy: Tensor) -> Any:
    z, branch_weight, scale, bias, keep_mask = ctx.saved_tensors
    grad_z, grad_weight, sums = branch_energy_backward(
        grad_energy, z, branch_weight, scale, bias, keep_mask
    )
    return grad_z, grad_weight, *split_sums(sums, scale), None


branch_energy_backward.register_autograd(refuse_derivative)
branch_energy.register_autograd(_branch_energy_gradients, setup_context=_save_for_branch_energy)


@operator("normalize_branches")
def normalize_branches(
    z: Tensor,
    branch_weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(2)-(5), (10)-(12) up to the convolution, for `h = relu(scale z + bias)`.

    Arguments as for `branch_energy`, and `drop_mask [B, N]`.

    Returns:
        `s h` like `z`, `Ebar [B, N]`, and `1/M [B]`, which has no gradient.
    """
    return forward(z, branch_weight, scale, bias, drop_mask, keep_mask)[:3]


def forward(
    z: Tensor,
    branch_weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Does what `normalize_branches` does, and returns the forms `Q [N, D, D]` that kernels read,
    for `backward`."""
    check_filled("z", z)
    rows = (coded_rows.aggregate_forward,)
    launch = Launch.of(z, branch_weight, scale, bias, drop_mask, keep_mask, rows=rows)
    if launch is None:
        h = affine.activate(z, scale, bias)
        result = gram.normalize(h, branch_weight, drop_mask, keep_mask)
        inverse = result.inverse[:, 0].contiguous()
        return channels_last(result.scaled), result.energies.contiguous(), inverse, None
    scaled = empty_rows(z)
    normalized = launch.form.new_empty((launch.batch, launch.sizes.branches))
    energy, inverse = torch.empty_like(normalized), normalized.new_empty((launch.batch,))
    with on_device(z):
        coded_rows.aggregate_forward(launch.sizes, launch.variant).launch(
            (launch.batch,),
            scaled,
            normalized,
            inverse,
            energy,
            launch.rows,
            launch.scale,
            launch.bias,
            launch.form,
            launch.drop,
            launch.keep,
            launch.inverse_size,
        )
    return scaled.permute(0, 3, 1, 2), normalized, inverse, launch.form


@operator("normalize_branches_backward")
def normalize_branches_backward(
    grad_scaled: Tensor,
    grad_normalized: Tensor,
    z: Tensor,
    branch_weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
    normalized: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(13)-(17) without the part of `dW` that the convolution computes.

    Returns:
        The gradients of `z` and `branch_weight`, and the sums of `behind_activation`.
    """
    saved = (z, branch_weight, scale, bias, drop_mask, keep_mask, normalized, inverse)
    grad_weight = torch.zeros_like(branch_weight, memory_format=torch.contiguous_format)
    grad, sums = backward(grad_scaled, grad_normalized, *saved, grad_weight)
    return grad, grad_weight, total(sums, z)


def backward(
    grad_scaled: Tensor,
    grad_normalized: Tensor,
    z: Tensor,
    branch_weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
    normalized: Tensor,
    inverse: Tensor,
    grad_weight: Tensor,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Does what `normalize_branches_backward` does, with the sums in parts, `[parts, 2, N*D]`.

    What the energies add to the gradient of the weight is added to `grad_weight [N, C, D]`, of any
    strides. `form` is what `forward` gave, or None.
    """
    check_filled("z", z)
    rows = (coded_rows.aggregate_backward, coded_rows.weighted_gram)
    launch = Launch.of(z, branch_weight, scale, bias, drop_mask, keep_mask, rows=rows, form=form)
    if launch is None:
        h = affine.activate(z, scale, bias)
        forward = gram.normalize(h, branch_weight, drop_mask, keep_mask)
        grad_h, of_energies = gram.normalize_backward(
            grad_scaled, grad_normalized, h, branch_weight, forward, keep_mask
        )
        grad_weight += of_energies
        return behind_activation(grad_h, z, scale, bias)
    grad, coefficient = empty_rows(z), torch.empty_like(normalized)
    parts = None if scale is None else normalized.new_empty((launch.batch, 2, z.shape[1]))
    with on_device(z):
        coded_rows.aggregate_backward(launch.sizes, launch.variant).launch(
            (launch.batch,),
            grad,
            parts,
            coefficient,
            as_rows(grad_scaled),
            launch.rows,
            launch.scale,
            launch.bias,
            launch.form,
            launch.drop,
            launch.keep,
            normalized,
            inverse,
            grad_normalized.contiguous(),
            launch.inverse_size,
        )
        launch.add_weight_gradient(coefficient, branch_weight, grad_weight)
    return grad.permute(0, 3, 1, 2), parts


def _save_for_normalize(ctx: Any, inputs: Any, output: Any) -> None:
    _, normalized, inverse = output
    ctx.save_for_backward(*inputs, normalized, inverse)
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(True)


def _normalize_gradients(ctx: Any, grad_scaled: Tensor, grad_normalized: Tensor, _: Any) -> Any:
    # Checkpointing without reentrance gives every saved tensor once.
    saved = ctx.saved_tensors
    grad_z, grad_weight, sums = normalize_branches_backward(grad_scaled, grad_normalized, *saved)
    return grad_z, grad_weight, *split_sums(sums, saved[2]), None, None


normalize_branches_backward.register_autograd(refuse_derivative)
normalize_branches.register_autograd(_normalize_gradients, setup_context=_save_for_normalize)
