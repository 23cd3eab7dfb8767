"""The definition of the coding loss (7) and of early decoding (9), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.kernels.layout import accumulation_dtype, without_autocast


@without_autocast
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


@without_autocast
def class_scores(energies: Tensor, codewords: Tensor) -> Tensor:
    """Returns the scores of early decoding, (9): `[B, N]` and `[K, N]` to `[B, K]`.

    All codewords have the same number of ones, so that the nearest one in Euclidean distance is
    the one with the largest inner product. Ties of `argmax` go to the lowest class.
    """
    return energies @ codewords.to(energies.dtype).T
