"""Paths: the energy that every branch really spends on every class, beside the codewords.

And on every image: one whose energy lies outside the path of its class is odd, or mislabelled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .observe import Observations, require_coded_blocks

LISTED = 20


@dataclass(frozen=True)
class Disobedient:
    """An image that does not keep to the path of its class."""

    position: int
    """Place of the image in the loader, from 0."""
    target: int
    """Class of the image, according to its label."""
    prediction: int
    """The class that the network says."""
    decoded: tuple[int, ...]
    """The class whose codeword is nearest, (9), in every coded block."""
    outside: tuple[float, ...]
    """Share of the energy in branches that do not work for its class, in every coded block."""


@dataclass(frozen=True, eq=False)
class Paths:
    """Mean energies of the branches by class, on the scale of the codewords."""

    samples_per_class: tuple[int, ...]
    """Images of every class that were averaged."""
    energies: tuple[Tensor, ...]
    """For every coded block, `[K, N]` in float64: the mean of `r Ebar`, (4), which a perfect
    network makes equal to the codeword (rows sum to A); NaN for a class without images."""
    outside: tuple[float, ...]
    """For every coded block, the mean share of an image's energy in branches that do not work for
    its class; 0 where all keep to their paths, `1 - r` where the code has no effect."""
    disobeying: tuple[int, ...]
    """For every coded block, the images whose energies are nearest to another class's codeword."""
    disobedient: tuple[Disobedient, ...]
    """The 20 images with the most energy outside their path (mean over the blocks), worst first,
    of those that disobey in some block."""

    @classmethod
    def of(cls, observed: Observations) -> Paths:
        """Averages the energies by class in every coded block; ValueError if there is none."""
        require_coded_blocks(observed.codebooks)
        targets = observed.targets
        counts = targets.bincount(minlength=len(observed.class_names))
        means = []
        for energies, book in zip(observed.energies, observed.codebooks, strict=True):
            total = torch.zeros(book.classes, book.branches, dtype=torch.float64)
            total.index_add_(0, targets, energies.double())
            # A class without images divides 0 by 0: NaN.
            means.append(book.ratio * total / counts[:, None])
        outside = energy_outside(observed)
        disobeying = torch.stack([decoded != targets for decoded in observed.decoded], 1)
        order = outside.mean(1).sort(descending=True, stable=True).indices
        listed = [row for row in order.tolist() if bool(disobeying[row].any())][:LISTED]
        return cls(
            samples_per_class=tuple(counts.tolist()),
            energies=tuple(means),
            outside=tuple(outside.mean(0).tolist()),
            disobeying=tuple(disobeying.sum(0).tolist()),
            disobedient=tuple(
                Disobedient(
                    position=row,
                    target=int(targets[row]),
                    prediction=int(observed.predictions[row]),
                    decoded=tuple(int(decoded[row]) for decoded in observed.decoded),
                    outside=tuple(outside[row].tolist()),
                )
                for row in listed
            ),
        )


def energy_outside(observed: Observations) -> Tensor:
    """Returns the share of every image's energy in branches that do not work for its class.

    Returns:
        `[n, L]` in float64 for L coded blocks; 1 for an image without any energy in a block.
    """
    shares = []
    for energies, book in zip(observed.energies, observed.codebooks, strict=True):
        inside = (energies.double() * book.codewords[observed.targets]).sum(1)
        shares.append(1 - inside / book.branches)
    return torch.stack(shares, 1)
