"""Early decoding: reading the class off the branch energies of a block, (9) of docs/math.md."""

from __future__ import annotations

from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.kernels.checks import check_finite
from coded_resnext.kernels.loss.reference import class_scores


def decode(energies: Tensor, codebook: Codebook | Tensor) -> Tensor:
    """Returns the class whose codeword is nearest to the energies.

    Args:
        energies: `[B, N]`, normalised or not: only their proportions matter.
        codebook: the codebook of the block, or its codewords `[K, N]`.

    Returns:
        Class indices `[B]`. Ties go to the lowest index; a sample without any energy ties between
        all classes.

    Raises:
        ValueError: the energies are not `[B, N]` with the codebook's N, or on the CPU not finite.
    """
    codewords = codebook.codewords if isinstance(codebook, Codebook) else codebook
    if energies.ndim != 2 or energies.shape[1] != codewords.shape[1]:
        raise ValueError(
            f"energies: expected [B, {codewords.shape[1]}], got {list(energies.shape)}"
        )
    check_finite("energies", energies)
    return read_class(energies, codewords.to(energies.device))[0]


def read_class(energies: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what early decoding, (9), says, and its margin.

    Args:
        energies: normalised, `[B, N]`.
        codewords: `[K, N]`, `K >= 2`.

    Returns:
        Class indices `[B]`, the lowest on ties, and margins `[B]` from 0 to 1: the share of a
        sample's energy in the branches of the nearest codeword, less that of the second.
    """
    scores = class_scores(energies, codewords)
    best = scores.topk(2).values
    return scores.argmax(1), (best[:, 0] - best[:, 1]) / energies.shape[1]
