"""The definition of every coded operation, unfused, in plain PyTorch.

This file is the oracle: it follows docs/math.md line by line and forms the branch tensor
`T [B, N, C, H, W]`, N times the size of the block's output. Use it to check, never to train.

Shapes: B samples, N branches of width D, C output channels, H x W maps of P pixels, K classes.
Weights come one matrix per branch, `[N, C, D]`. Under concatenation a branch writes C/N channels,
and `C` below stands for that number.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A sample whose mean energy is not above this is dead: nothing flows through it, in either
# direction. Its square root and the powers that the gradients need stay inside float32.
DEAD_ENERGY = 1e-24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which energies and sums are formed: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def branch_outputs(h: Tensor, branch_weight: Tensor) -> Tensor:
    """(1) `T_n = W_n h_n`: `[B, N*D, H, W]` and `[N, C, D]` to `[B, N, C, H, W]`."""
    branches, _, width = branch_weight.shape
    per_branch = h.reshape(h.shape[0], branches, width, *h.shape[2:])
    return torch.einsum("ncd,bndhw->bnchw", branch_weight.to(h.dtype), per_branch)


def branch_energy(h: Tensor, branch_weight: Tensor) -> Tensor:
    """(2) `E [B, N]` from the branch outputs."""
    return branch_outputs(h, branch_weight).square().mean((2, 3, 4))


def is_dead(mean: Tensor) -> Tensor:
    """Samples whose mean energy (3) is too small to divide by. A NaN is not dead: it stays NaN."""
    return mean <= DEAD_ENERGY


def coded_aggregate(
    h: Tensor,
    branch_weight: Tensor,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    *,
    concatenate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Energies, normalisation, DropSubNNs and branch sum, (1)-(6) and (10).

    Args:
        h: `[B, N*D, H, W]`, the activations of all branches.
        branch_weight: `[N, C, D]`.
        drop_mask: `[B, N]`, (5), zero or `1 / (1 - p)`; applied after the energies were taken.
        keep_mask: `[B, N]`, (10), zero or one; applied before.
        concatenate: stack the branches along the channels instead of summing them.

    Returns:
        `y [B, C, H, W]` (`[B, N*C, H, W]` when concatenated) in the dtype of `h`, and the
        normalised energies `Ebar [B, N]`, float64 for float64 input and float32 otherwise.
    """
    accumulate = accumulation_dtype(h.dtype)
    outputs = branch_outputs(h, branch_weight).to(accumulate)
    if keep_mask is not None:
        outputs = outputs * keep_mask.to(accumulate)[:, :, None, None, None]
    energy = outputs.square().mean((2, 3, 4))
    mean = energy.mean(1, keepdim=True)
    dead = is_dead(mean)
    # Dead samples divide by 1, and what that gives is replaced by 0, value and gradient.
    divisor = torch.where(dead, 1.0, mean)
    normalized = outputs / divisor.sqrt()[:, :, None, None, None]
    normalized = torch.where(dead[:, :, None, None, None], 0.0, normalized)
    if drop_mask is not None:
        normalized = normalized * drop_mask.to(accumulate)[:, :, None, None, None]
    y = normalized.flatten(1, 2) if concatenate else normalized.sum(1)
    return y.to(h.dtype), torch.where(dead, 0.0, energy / divisor)


def coding_loss(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    exponent: float = 4.0,
    threshold: float = 0.0,
) -> Tensor:
    """(7) `mean over (b, n) of max(|r Ebar - codeword| - t, 0)^q`, a scalar.

    Args:
        energies: `[B, N]`, normalised.
        codewords: `[K, N]`, boolean.
        targets: `[B]` class indices, or `[B, K]` class probabilities, whose codeword is the
            probability-weighted mean of the codewords.
        exponent: `q`.
        threshold: `t`.
    """
    accumulate = accumulation_dtype(energies.dtype)
    wanted_of_class = codewords.to(accumulate)
    ratio = wanted_of_class[0].mean()
    if targets.ndim == 1:
        wanted = wanted_of_class[targets]
    else:
        wanted = targets.to(accumulate) @ wanted_of_class
    excess = torch.relu((ratio * energies.to(accumulate) - wanted).abs() - threshold)
    return excess.pow(exponent).mean()


def grouped_conv3x3(
    x: Tensor,
    weight: Tensor,
    groups: int,
    stride: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The grouped 3x3 convolution of `relu(scale x + bias)`, padded with zeros after the ReLU.

    Args:
        x: `[B, N*D, H, W]`.
        weight: `[N*D, D, 3, 3]`.
        groups: `N`.
        stride: of the output, `[B, N*D, OH, OW]` with `OH = ceil(H / stride)`.
        scale, bias: `[N*D]`; without them `x` itself is convolved.
    """
    if scale is not None and bias is not None:
        x = torch.relu(scale[:, None, None] * x + bias[:, None, None])
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, channels, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    grouped = padded.view(batch, groups, -1, height + 2, width + 2)
    taps = weight.reshape(groups, -1, *weight.shape[1:])
    y = x.new_zeros(batch, channels, -(-height // stride), -(-width // stride))
    for row in range(3):
        for column in range(3):
            shifted = grouped[..., row : row + height : stride, column : column + width : stride]
            y = y + torch.einsum("goi,bgihw->bgohw", taps[..., row, column], shifted).flatten(1, 2)
    return y


def conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The 1x1 convolution of `relu(scale x + bias)`, `[B, O, H, W]`.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        scale, bias: `[I]`; without them `x` itself is convolved.
    """
    if scale is not None and bias is not None:
        x = torch.relu(scale[:, None, None] * x + bias[:, None, None])
    return torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x)


def join(
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor:
    """The end of a residual block: `relu(scale y + bias + residual)`, the residual through a map of
    its own where it has one. Maps `[B, C, H, W]`, vectors `[C]`."""
    if residual_scale is not None and residual_bias is not None:
        residual = residual_scale[:, None, None] * residual + residual_bias[:, None, None]
    return torch.relu(scale[:, None, None] * y + bias[:, None, None] + residual)


def channel_statistics(y: Tensor) -> Tensor:
    """Count, sum and sum of squared deviations from the mean of each channel: `[3, C]`."""
    values = y.transpose(0, 1).flatten(1)
    total = values.sum(1)
    mean = total / values.shape[1]
    squares = (values - mean[:, None]).square().sum(1)
    return torch.stack([torch.full_like(total, values.shape[1]), total, squares])
