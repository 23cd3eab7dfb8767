"""Paths: the energy that every branch really spends on every class, beside the codewords."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import CodedResNeXt
from .running import Loader, batches, evaluating, require_coded_blocks


@dataclass(frozen=True, eq=False)
class Paths:
    """Mean energies of the branches by class, on the scale of the codewords."""

    samples_per_class: tuple[int, ...]
    """Images of every class that were averaged."""
    energies: tuple[Tensor, ...]
    """For every coded block, `[K, N]` in float64: the mean of `r Ebar`, (4), which a perfect
    network makes equal to the codeword (rows sum to A); NaN for a class without images."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; the row of a class without images is None."""
        return {
            "samples_per_class": list(self.samples_per_class),
            "energies": [
                [
                    row if count else None
                    for row, count in zip(block.tolist(), self.samples_per_class, strict=True)
                ]
                for block in self.energies
            ],
        }


def measure_paths(model: CodedResNeXt, loader: Loader) -> Paths:
    """Average the branch energies of the images of each class in every coded block.

    Args:
        model: with at least one coded block; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.

    Raises:
        ValueError: the network has no coded block, the loader has no batch, or targets are not
            class indices of the model.
    """
    require_coded_blocks(model)
    codebooks = model.codebooks
    sums = [torch.zeros(book.classes, book.branches, dtype=torch.float64) for book in codebooks]
    counts = torch.zeros(model.num_classes, dtype=torch.int64)
    with evaluating(model):
        for images, targets in batches(model, loader, "paths"):
            _, all_energies = model(images, return_energies=True)
            classes = targets.cpu()
            counts += classes.bincount(minlength=model.num_classes)
            for total, energies in zip(sums, all_energies, strict=True):
                total.index_add_(0, classes, energies.cpu().double())
    # A class without images divides 0 by 0: NaN.
    return Paths(
        samples_per_class=tuple(counts.tolist()),
        energies=tuple(
            book.ratio * total / counts[:, None]
            for book, total in zip(codebooks, sums, strict=True)
        ),
    )
