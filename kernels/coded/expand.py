"""The fused branch sum as the PyTorch operator `coded_resnext::coded_expand`; see
kernels/coded/operator.py.

Its backward pass is matrix products of PyTorch: nothing is left to fuse into them but masks, and
the coded blocks do not use it (kernels/README.md says why).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels import affine
from coded_resnext.kernels.affine import behind_activation, split_sums
from coded_resnext.kernels.checks import check_filled
from coded_resnext.kernels.layout import accumulation_dtype, channels_last, empty_rows, on_device

from . import expand_rows, gram
from .launch import Launch, runs_kernels
from .operator import branch_energy, branch_energy_backward


def _channel_mask(masks: tuple[Tensor | None, ...], width: int) -> Tensor | None:
    """The product of the masks `[B, N]` that are there, `[B, N*D, 1, 1]`."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    product = present[0] if len(present) == 1 else present[0] * present[1]
    return product.repeat_interleave(width, 1)[:, :, None, None]


def _per_branch(weight: Tensor, branches: int) -> Tensor:
    return gram.split_weight(weight[:, :, None, None], branches, concatenate=False)


@torch.library.custom_op("coded_resnext::coded_expand", mutates_args=())
def coded_expand(
    z: Tensor,
    weight: Tensor,
    branches: int,
    scale: Tensor | None,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
    factor: Tensor | None,
    moments: bool,
    energies: bool,
    from_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = factor sum_n drop keep W_n h_n` for `h = relu(scale z + bias)`.

    `z [B, N*D, H, W]`, `weight [C, N*D]`, `scale` and `bias [N*D]`, masks `[B, N]`, `factor [B]`.

    Returns:
        `y [B, C, H, W]`; with `moments` the sums over pixels of `y` and `y^2`, `[2, B, C]`; with
        `energies` the energies `[B, N]`, which `from_tiles` takes inside the product. What is not
        asked for is empty.
    """
    check_filled("z", z)
    accumulate = accumulation_dtype(z.dtype)
    width = z.shape[1] // branches
    if not runs_kernels(z, width):
        h = affine.activate(z, scale, bias).to(accumulate)
        mask = _channel_mask((drop_mask, keep_mask), width)
        masked = h if mask is None else h * mask
        y = torch.einsum("ck,bkhw->bchw", weight.to(accumulate), masked)
        sums, energy = y.new_empty((0,)), y.new_empty((0,))
        if moments:
            sums = torch.stack([y.sum((2, 3)), y.square().sum((2, 3))])
        if energies:
            energy, _ = gram.energies_and_grams(h, _per_branch(weight, branches), keep_mask)
            energy = energy.contiguous()
        if factor is not None:
            y = y * factor[:, None, None, None]
        return channels_last(y.to(z.dtype)), sums, energy
    launch = Launch(z, _per_branch(weight, branches), scale, bias, drop_mask, keep_mask)
    sizes, variant = launch.sizes, launch.variant
    fused = energies and from_tiles and expand_rows.takes_energy(sizes, variant)
    row = expand_rows.expand_forward(
        sizes, variant, sums=moments, energy=fused, factor=factor is not None
    )
    settings = dict(row.constexprs)
    blocks = -(-sizes.pixels // int(settings["BLOCK_P"]))
    columns = -(-sizes.channels // int(settings["BLOCK_C"]))
    tiles = -(-launch.batch // int(settings["SAMPLES"]))
    y = empty_rows(z, sizes.channels)
    partial = launch.form.new_empty((blocks, 2, launch.batch, sizes.channels)) if moments else None
    parts = launch.form.new_empty((blocks, launch.batch, branches)) if fused else None
    with on_device(z):
        row.launch(
            (columns * blocks * tiles,),
            y,
            partial,
            parts,
            launch.rows,
            launch.scale,
            launch.bias,
            weight.to(z.dtype).contiguous(),
            launch.form if fused else None,
            launch.drop,
            launch.keep,
            None if factor is None else factor.to(torch.float32).contiguous(),
            launch.batch,
        )
    energy = launch.form.new_empty((0,))
    if parts is not None:
        energy = parts.sum(0).clamp_min(0) * launch.inverse_size
    elif energies:
        energy = branch_energy(z, _per_branch(weight, branches), scale, bias, keep_mask)
    sums = energy.new_empty((0,)) if partial is None else partial.sum(0)
    return y.permute(0, 3, 1, 2), sums, energy


@coded_expand.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    branches: int,
    scale: Tensor | None,
    bias: Tensor | None,
    drop_mask: Tensor | None,
    keep_mask: Tensor | None,
    factor: Tensor | None,
    moments: bool,
    energies: bool,
    from_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, accumulate = z.shape[0], weight.shape[0], accumulation_dtype(z.dtype)
    return (
        empty_rows(z, channels).permute(0, 3, 1, 2),
        z.new_empty((2, batch, channels) if moments else (0,), dtype=accumulate),
        z.new_empty((batch, branches) if energies else (0,), dtype=accumulate),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    z, weight, branches, scale, bias, drop, keep, factor, moments, energies, _ = inputs
    y = output[0] if moments else None
    ctx.save_for_backward(z, weight, scale, bias, drop, keep, factor, y)
    ctx.branches, ctx.moments, ctx.energies = branches, moments, energies


def _gradients(ctx: Any, grad_y: Tensor, grad_sums: Tensor, grad_energy: Tensor) -> Any:
    z, weight, scale, bias, drop_mask, keep_mask, factor, y = ctx.saved_tensors
    accumulate = accumulation_dtype(z.dtype)
    width = z.shape[1] // ctx.branches
    grad = grad_y.to(accumulate)
    if ctx.moments:
        first, second = grad_sums[:, :, :, None, None]
        grad = grad + first + 2 * second * y.to(accumulate)
    h = affine.activate(z, scale, bias)
    mask = _channel_mask((drop_mask, keep_mask), width)
    masked = h.to(accumulate) if mask is None else h.to(accumulate) * mask
    grad, masked = grad.to(z.dtype), masked.to(z.dtype)
    image = torch.einsum("ck,bchw->bkhw", weight.to(z.dtype), grad).to(accumulate)
    grad_factor = None
    if factor is not None:
        grad_factor = (image * masked).sum((1, 2, 3)).to(factor.dtype)
        per_sample = factor.to(accumulate)[:, None, None, None]
        image, grad = image * per_sample, (grad * per_sample).to(z.dtype)
    grad_weight = torch.einsum("bchw,bkhw->ck", grad, masked).to(accumulate)
    grad_h = image if mask is None else image * mask
    if ctx.energies:
        from_energy, weight_part, _ = branch_energy_backward(
            grad_energy, h, _per_branch(weight, ctx.branches), None, None, keep_mask
        )
        grad_h = grad_h + from_energy
        grad_weight = grad_weight + weight_part.transpose(0, 1).reshape(weight.shape)
    grad_z, sums = behind_activation(grad_h, z, scale, bias)
    return (
        grad_z,
        grad_weight.to(weight.dtype),
        None,
        *split_sums(sums, scale),
        None,
        None,
        grad_factor,
        None,
        None,
        None,
    )


coded_expand.register_autograd(_gradients, setup_context=_save)
