"""The definition of the coding loss (7) and of early decoding (9), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.checks import is_no_class
from coded_resnext.kernels.layout import accumulation_dtype, without_autocast


@without_autocast
def coding_loss(
    energies: Tensor,
    codewords: Tensor,
    targets: Tensor,
    shares: Tensor | None = None,
    exponent: float = 4.0,
    threshold: float = 0.0,
) -> Tensor:
    """(7) `mean over (b, n) of max(|r Ebar - codeword| - t, 0)^q`, a scalar.

    Args:
        energies: `[B, N]`, normalised.
        codewords: `[K, N]`, boolean.
        targets: `[B]` class indices, or `[B, K]` class probabilities, whose codeword is the
            probability-weighted mean of the codewords.
        shares: of every sample in the mean, `[B]`, from `sample_shares`; None where all are equal.
            A sample with a share of 0 is left out, whatever its energies are.
        exponent: `q`.
        threshold: `t`.
    """
    accumulate = accumulation_dtype(energies.dtype)
    ratio = codewords[0].to(accumulate).mean()
    if targets.ndim == 2:
        wanted = targets.to(accumulate) @ codewords.to(accumulate)
    else:
        # What is no class has a share of 0 or NaN.
        labels = targets.long() if shares is None else targets.long().clamp(0, len(codewords) - 1)
        wanted = codewords[labels].to(accumulate)
    energies = energies.to(accumulate)
    if shares is not None:
        energies = energies.masked_fill((shares == 0)[:, None], 0.0)
    excess = torch.relu((ratio * energies - wanted).abs() - threshold).pow(exponent)
    return excess.mean() if shares is None else (shares.to(accumulate) * excess.mean(1)).sum()


def sample_shares(
    targets: Tensor,
    classes: int,
    dtype: torch.dtype,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Returns the share of each sample in the mean over a batch, as `F.cross_entropy` takes it.

    Args:
        targets: `[B]` class indices, or `[B, K]` class probabilities.
        classes: `K`.
        dtype: of the shares.
        class_weight: `[K]`; equal weights if None.
        ignore_index: the class index of samples without a label.

    Returns:
        `[B]`. A sample without a label has 0. A label that is no class makes all of them NaN.
    """
    if targets.ndim == 2:
        weight = torch.ones_like(targets[:, 0], dtype=dtype)
        if class_weight is not None:
            weight = (targets.to(dtype) * class_weight.to(dtype)).sum(1)
        return weight / len(targets)
    targets = targets.long()
    weight = torch.ones_like(targets, dtype=dtype)
    if class_weight is not None:
        weight = class_weight.to(dtype)[targets.clamp(0, classes - 1)]
    weight = weight.masked_fill(is_no_class(targets, classes), torch.nan)
    weight = weight.masked_fill(targets == ignore_index, 0.0)
    return weight / weight.sum()


@without_autocast
def class_scores(energies: Tensor, codewords: Tensor) -> Tensor:
    """Returns the scores of early decoding, (9): `[B, N]` and `[K, N]` to `[B, K]`.

    All codewords have the same number of ones, so that the nearest one in Euclidean distance is
    the one with the largest inner product. Ties of `argmax` go to the lowest class.
    """
    return energies @ codewords.to(energies.dtype).T
