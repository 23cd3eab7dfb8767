"""Images of none of the classes of a data set, for one-class classifiers to refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .datasets import load_dataset
from .image_folder import find_images
from .image_sets import FileImages, ImageSet, ImageSplits, MemoryImages
from .recipe import Recipe

ROTATED = "rotated"
CIFAR = ("cifar10", "cifar100")


def open_outside(name: str, splits: ImageSplits, recipe: Recipe) -> ImageSet:
    """Images of none of the classes.

    Args:
        name: `"rotated"` for the test images turned by a quarter, `"cifar10"` or `"cifar100"` for
            the test images of these, found where the recipe looks for data; or a folder of images.
        splits: the data set.
        recipe: of the run.

    Raises:
        ValueError: the images are the data set's own, or a folder has none.
        OSError: there are no such images.
    """
    if name == ROTATED:
        return rotated(splits.test)
    if name not in CIFAR:
        files = find_images([Path(name)])
        return FileImages(tuple(files), torch.zeros(len(files), dtype=torch.int64))
    if name == recipe.data.dataset:
        raise ValueError(f"outside: expected another data set than {name}, which is the run's own")
    return load_dataset(name, recipe.data.data_dir, download=recipe.data.download).test


def rotated(images: ImageSet) -> MemoryImages:
    """All images turned by a quarter, counterclockwise."""
    return MemoryImages(
        [np.rot90(np.asarray(images.image(index))) for index in range(len(images))],
        images.targets,
        [f"{images.name(index)}, turned" for index in range(len(images))],
    )
