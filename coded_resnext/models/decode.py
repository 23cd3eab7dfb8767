"""Early decoding: reading the class off the branch energies of a block, (9) of docs/math.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.kernels.checks import check_finite, check_kind
from coded_resnext.kernels.loss.reference import class_scores


def decode(energies: Tensor, codebook: Codebook | Tensor, *, check_values: bool = True) -> Tensor:
    """Returns the class whose codeword is nearest to the energies.

    Args:
        energies: `[B, N]`, normalised or not: only their proportions matter.
        codebook: the codebook of the block, or its codewords `[K, N]`.
        check_values: refuse energies on the CPU that are not finite.

    Returns:
        Class indices `[B]`. Ties go to the lowest index; a sample without any energy ties between
        all classes.

    Raises:
        ValueError: the energies are not `[B, N]` with the codebook's N, or on the CPU not finite.
    """
    check_kind("energies", energies, Tensor, "a tensor [B, N]")
    check_kind("codebook", codebook, (Codebook, Tensor), "a Codebook or a tensor [K, N]")
    check_kind("check_values", check_values, bool, "True or False")
    codewords = codebook.codewords if isinstance(codebook, Codebook) else codebook
    if energies.ndim != 2 or energies.shape[1] != codewords.shape[1]:
        raise ValueError(
            f"energies: expected [B, {codewords.shape[1]}], got {list(energies.shape)}"
        )
    if check_values:
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


def not_finite(logits: Tensor, energies: Sequence[Tensor]) -> Tensor:
    """Returns whether the energies of each coded block, then the logits, hold NaN or infinity.

    Args:
        logits: `[B, K]`.
        energies: of every coded block, `[B, N]`.

    Returns:
        Booleans `[blocks + 1]`, on the device of the logits.
    """
    return torch.stack([~values.isfinite().all() for values in (*energies, logits)])


def check_results(model: nn.Module, bad: Tensor) -> None:
    """Refuse results that hold NaN or infinity, of which `argmax` would still make a class.

    Args:
        model: the network, whose first tensor that is not finite is named.
        bad: from `not_finite`; the host waits for it.

    Raises:
        ValueError: something is not finite; the message names the first of the network.
    """
    flags = bad.tolist()
    if not any(flags):
        return
    first = flags.index(True)
    place = "logits" if first == len(flags) - 1 else f"energies of coded block {first + 1}"
    tensors = [
        name
        for name, value in model.state_dict().items()
        # A quantised layer has other things in its state.
        if isinstance(value, Tensor) and not bool(value.isfinite().all())
    ]
    cause = f"{tensors[0]} of the network is not" if tensors else "the network's tensors are"
    raise ValueError(f"model: expected finite results, got NaN or infinity in the {place}; {cause}")
