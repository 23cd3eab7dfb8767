"""Choosing the margins of an early exit on samples that the network was not trained on.

Letters: n samples, L coded blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .early_exit import EarlyExit, check, read_class
from .models import CodedResNeXt


@dataclass(frozen=True)
class ExitScores:
    """What every decoder says about labelled samples: all that a calibration needs."""

    decoded: Tensor
    """`[n, L]`, the class that each coded block shows."""
    margins: Tensor
    """`[n, L]`, of these readings."""
    final: Tensor
    """`[n]`, the class of the classifier."""
    targets: Tensor
    """`[n]`, the true class."""

    @classmethod
    def joined(cls, parts: Sequence[ExitScores]) -> ExitScores:
        """The samples of several, such as the held-out parts of a cross-validation."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("decoded", "margins", "final", "targets")
            )
        )

    def exits(self, criterion: EarlyExit) -> Tensor:
        """Where every sample leaves, `[n]`: a coded block counted from 0, or L."""
        blocks = self.decoded.shape[1]
        exits = torch.full_like(self.final, blocks)
        for block in reversed(range(blocks)):
            previous = self.decoded[:, block - 1] if block else None
            leaving = criterion.leaves(
                block, self.decoded[:, block], self.margins[:, block], previous
            )
            exits[leaving] = block
        return exits

    def accuracy(self, criterion: EarlyExit | None = None) -> float:
        """Share of correct predictions, with early exit or, by default, of the classifier."""
        said = self.final
        if criterion is not None:
            every = torch.cat([self.decoded, self.final[:, None]], 1)
            said = every.gather(1, self.exits(criterion)[:, None])[:, 0]
        return float((said == self.targets).double().mean())


@torch.inference_mode()
def exit_scores(model: CodedResNeXt, loader: Iterable[tuple[Tensor, Tensor]]) -> ExitScores:
    """Decode labelled images behind every coded block.

    Args:
        model: with at least one coded block, in evaluation mode.
        loader: batches of images `[B, C, H, W]` and class indices `[B]` that the network was not
            trained on: on its training images every margin looks better than it is.

    Raises:
        ValueError: the network is plain or in training mode, or the loader has no batch.
    """
    check(model)
    parameter = next(model.parameters())
    parts = []
    for images, targets in loader:
        logits, energies = model(images.to(parameter), return_energies=True)
        read = [
            read_class(value, block.codewords)
            for value, block in zip(energies, model.coded_blocks, strict=True)
        ]
        decoded = torch.stack([classes for classes, _ in read], 1).cpu()
        margins = torch.stack([margin for _, margin in read], 1).cpu()
        parts.append(ExitScores(decoded, margins, logits.argmax(1).cpu(), targets.cpu().long()))
    if not parts:
        raise ValueError("loader: expected at least one batch, got none")
    return ExitScores.joined(parts)


def calibrate(
    scores: ExitScores, max_accuracy_loss: float = 0.001, *, agreement: bool = False
) -> EarlyExit:
    """Choose margins so that early exit costs at most so much accuracy on held-out samples.

    A sample is lost when the classifier is right about it and the decoder with which it leaves is
    not; samples that early exit gains do not make up for lost ones. From the first coded block on,
    each gets the lowest margin with which the losses so far stay within the limit. At the last
    coded block no sample leaves: only the classifier is behind it.

    Args:
        scores: of samples that the network was not trained on.
        max_accuracy_loss: largest share of the samples that may be lost, `0 <= loss < 1`.
        agreement: whether two consecutive decoders must agree.

    Raises:
        ValueError: the loss is outside its range.
    """
    if not 0 <= max_accuracy_loss < 1:
        raise ValueError(
            f"max_accuracy_loss: expected a share 0 <= loss < 1, got {max_accuracy_loss}"
        )
    samples, blocks = scores.decoded.shape
    # The product of a share and a number may fall just short of the whole number that is meant.
    allowed = math.floor(max_accuracy_loss * samples + 1e-9)
    staying = torch.ones(samples, dtype=torch.bool)
    margins: list[float | None] = []
    for block in range(blocks):
        if block == blocks - 1 or (agreement and block == 0):
            margins.append(None)
            continue
        eligible = staying.clone()
        if agreement:
            eligible &= scores.decoded[:, block] == scores.decoded[:, block - 1]
        right = scores.decoded[:, block] == scores.targets
        lost = eligible & ~right & (scores.final == scores.targets)
        margin = _lowest_margin(scores.margins[:, block], eligible, lost, allowed)
        margins.append(margin)
        if margin is not None:
            leaving = eligible & (scores.margins[:, block] >= margin)
            allowed -= int((leaving & lost).sum())
            staying &= ~leaving
    return EarlyExit(tuple(margins), agreement)


def _lowest_margin(margins: Tensor, eligible: Tensor, lost: Tensor, allowed: int) -> float | None:
    """The lowest margin of an eligible sample with at most so many lost ones at or above it."""
    worst = margins[lost].sort(descending=True).values
    usable = margins[eligible]
    if len(worst) > allowed:
        usable = usable[usable > worst[allowed]]
    return float(usable.min()) if len(usable) else None
