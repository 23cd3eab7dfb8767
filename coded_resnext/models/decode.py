"""Early decoding: reading the class off the branch energies of a block, (9) of docs/math.md."""

from __future__ import annotations

import torch
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook


def decode(energies: Tensor, codebook: Codebook | Tensor) -> Tensor:
    """The class whose codeword is nearest to the energies.

    All codewords have the same number of ones, so the nearest one in Euclidean distance is the one
    with the largest inner product.

    Args:
        energies: `[B, N]`, normalised or not: only their proportions matter.
        codebook: the codebook of the block, or its codewords `[K, N]`.

    Returns:
        Class indices `[B]`. Ties go to the lowest index; a sample without any energy ties between
        all classes.

    Raises:
        ValueError: the energies are not `[B, N]` with the codebook's N.
    """
    codewords = codebook.codewords if isinstance(codebook, Codebook) else codebook
    if energies.ndim != 2 or energies.shape[1] != codewords.shape[1]:
        raise ValueError(
            f"energies: expected [B, {codewords.shape[1]}], got {list(energies.shape)}"
        )
    selected = codewords.to(device=energies.device, dtype=energies.dtype)
    # Autocast would round the energies to half precision and make ties.
    with torch.autocast(energies.device.type, enabled=False):
        return (energies @ selected.T).argmax(1)


def read_class(energies: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Early decoding, (9), and its margin.

    Args:
        energies: normalised, `[B, N]`.
        codewords: `[K, N]`.

    Returns:
        Class indices `[B]`, the lowest on ties, and margins `[B]` from 0 to 1 (see `EarlyExit`).
    """
    if torch.is_autocast_enabled(energies.device.type):
        # It would round the energies to half precision and make ties.
        with torch.autocast(energies.device.type, enabled=False):
            return read_class(energies, codewords)
    scores = energies @ codewords.to(energies.dtype).T
    best = scores.topk(2).values
    return scores.argmax(1), (best[:, 0] - best[:, 1]) / energies.shape[1]
