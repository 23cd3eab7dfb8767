"""How far the device's augmentation is from timm's and Pillow's, operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .augment import Augmentation, generators_kept, make_rand_augment, seed_generators
from .data import Preprocessing
from .device_augment import Draws
from .device_ops import apply_operation
from .image_sets import MemoryImages


@dataclass(frozen=True)
class Agreement:
    """One operation on the same images by the same draws; differences on the scale 0..255."""

    operation: str
    mean_difference: float
    largest_difference: int
    differing: float
    """Share of the channels of pixels that differ at all."""
    change: float
    """Mean difference that the operation itself makes."""


def compare_operations(
    images: MemoryImages, config: str, preprocessing: Preprocessing, device: torch.device
) -> Iterator[Agreement]:
    """Compare every operation of a RandAugment.

    Args:
        images: of the preprocessing's size; image i is drawn for by seed i.
        config: such as `rand-m4-n3`; every operation is applied to every image.
        preprocessing: size and colours.
        device: where the tensors are.
    """
    draws = Draws(Augmentation(crop_padding=0, aa=f"{config}-p1.0"), preprocessing)
    fill = torch.tensor(draws.fill, dtype=torch.uint8, device=device)
    pixels = images.pixels
    for operation in make_rand_augment(f"{config}-p1.0", preprocessing).ops:
        rows = draws.of_operation(operation.name, range(len(images)))
        found = apply_operation(pixels.to(device), rows.to(device), fill).cpu().int()
        made = []
        with generators_kept():
            for index in range(len(images)):
                seed_generators(index)
                made.append(np.array(operation(images.image(index))))
        wanted = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).int()
        difference = (found - wanted).abs()
        yield Agreement(
            operation.name,
            float(difference.double().mean()),
            int(difference.max()),
            float((difference > 0).double().mean()),
            float((wanted - pixels.int()).abs().double().mean()),
        )
