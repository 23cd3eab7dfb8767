"""Tracing one image: what every coded block spends its energy on, and what that already says.

Letters as in docs/math.md: N branches, A of them active for each class, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decode import decode
from ..models import CodedResNeXt
from .running import evaluating, require_coded_blocks

SHOWN = 3


@dataclass(frozen=True)
class BlockTrace:
    """One coded block and one image."""

    energies: tuple[float, ...]
    """`r Ebar` by branch, (4): on the scale of a codeword, with the sum A."""
    distances: tuple[float, ...]
    """Euclidean distance of these energies to the codeword of every class, (9)."""
    prediction: int
    """The class whose codeword is nearest."""
    path: tuple[int, ...]
    """The A branches with the most energy, ascending."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "energies": list(self.energies),
            "distances": list(self.distances),
            "prediction": self.prediction,
            "path": list(self.path),
        }


@dataclass(frozen=True)
class Trace:
    """One image on its way through a network; prints as a table."""

    class_names: tuple[str, ...]
    blocks: tuple[BlockTrace, ...]
    """The coded blocks, in order."""
    logits: tuple[float, ...]
    prediction: int
    """The class of the classifier."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "class_names": list(self.class_names),
            "blocks": [block.to_dict() for block in self.blocks],
            "logits": list(self.logits),
            "prediction": self.prediction,
        }

    def __str__(self) -> str:
        lines = []
        for number, block in enumerate(self.blocks, 1):
            energies = " ".join(f"{energy:.2f}" for energy in block.energies)
            order = sorted(range(len(self.class_names)), key=block.distances.__getitem__)
            near = ", ".join(
                f"{self.class_names[index]} {block.distances[index]:.2f}" for index in order[:SHOWN]
            )
            lines += [f"block {number}: energies {energies}", f"         nearest {near}"]
        return "\n".join([*lines, f"classifier: {self.class_names[self.prediction]}"])


def trace(model: CodedResNeXt, x: Tensor) -> Trace:
    """Follow one image through the network.

    Args:
        model: with at least one coded block; its mode is left as found.
        x: `[C, H, W]` or `[1, C, H, W]`.

    Raises:
        ValueError: the network has no coded block, or `x` is not one image.
    """
    require_coded_blocks(model)
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or len(batch) != 1:
        raise ValueError(f"x: expected one image [C, H, W] or [1, C, H, W], got {list(x.shape)}")
    with evaluating(model):
        logits, all_energies = model(batch.to(next(model.parameters())), return_energies=True)
    blocks = []
    for block, energies in zip(model.coded_blocks, all_energies, strict=True):
        book = block.codebook
        assert book is not None
        scaled = book.ratio * energies[0]
        distances = (scaled - block.codewords.to(scaled.dtype)).square().sum(1).sqrt()
        blocks.append(
            BlockTrace(
                energies=tuple(scaled.tolist()),
                distances=tuple(distances.tolist()),
                prediction=int(decode(energies, book)),
                path=strongest(energies[0], book.active),
            )
        )
    return Trace(
        model.class_names, tuple(blocks), tuple(logits[0].tolist()), int(logits[0].argmax())
    )


def strongest(energies: Tensor, active: int) -> tuple[int, ...]:
    """The `active` branches with the most energy of `[N]`, ascending; of equal ones the lowest."""
    order = torch.sort(energies, descending=True, stable=True).indices
    return tuple(sorted(order[:active].tolist()))
