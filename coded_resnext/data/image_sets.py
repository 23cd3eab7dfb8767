"""Sets of RGB images with targets: in files, or decoded in memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from coded_resnext.files import printable

from .image_folder import open_image
from .preprocessing import SPLIT_SEED, derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

NAMES_IN_MESSAGE = 10


class ImageSet(Protocol):
    """Images with targets, read one by one."""

    @property
    def targets(self) -> Tensor:
        """Class indices `[n]`, int64."""

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""

    def name(self, index: int) -> str:
        """Returns the name of an image in messages: its file, where it has one."""

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Returns the chosen images, in the order given."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images that are read from their files every time."""

    files: tuple[Path, ...]
    targets: Tensor

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""
        return open_image(self.files[index], channels=3)

    def name(self, index: int) -> str:
        """Returns the path of the file."""
        return str(self.files[index])

    def subset(self, indices: Sequence[int]) -> FileImages:
        """Returns the chosen images, in the order given."""
        chosen = tuple(self.files[index] for index in indices)
        return FileImages(chosen, self.targets[torch.as_tensor(indices, dtype=torch.int64)])

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images decoded in memory."""

    images: Pixels | Sequence[Pixels]
    """`[n, H, W, 3]`, uint8, or where sizes differ n arrays `[H, W, 3]`."""
    targets: Tensor
    names: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.targets) == len(self.names):
            raise ValueError(
                "images: expected as many as targets and names, got "
                f"{len(self.images)}, {len(self.targets)} and {len(self.names)}"
            )
        for image in self.images[:1]:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"images: expected uint8 [H, W, 3] each, got {image.dtype} {list(image.shape)}"
                )

    @property
    def pixels(self) -> Tensor:
        """All images as one tensor `[n, 3, H, W]`, uint8; a ValueError where sizes differ."""
        if isinstance(self.images, np.ndarray):
            return torch.from_numpy(self.images).permute(0, 3, 1, 2)
        sizes = {image.shape for image in self.images}
        if len(sizes) != 1:
            raise ValueError(f"images: expected one size for all, got {len(sizes)} sizes")
        return torch.from_numpy(np.stack(self.images)).permute(0, 3, 1, 2)

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB."""
        from PIL import Image

        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        """Returns the file that the image came from, or its place in one."""
        return self.names[index]

    def subset(self, indices: Sequence[int]) -> MemoryImages:
        """Returns the chosen images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = (
            self.images[chosen.numpy()]
            if isinstance(self.images, np.ndarray)
            else [self.images[index] for index in indices]
        )
        return MemoryImages(images, self.targets[chosen], [self.names[i] for i in indices])

    def __len__(self) -> int:
        return len(self.images)


class DamagedImages:
    """Lists the training images that cannot be read, and refuses to go on when there are too many.

    Args:
        images: number of images in the set.
        limit: largest share of them that may be damaged, 0 to 1; rounded up to whole images.
    """

    def __init__(self, images: int, limit: float) -> None:
        self.limit = math.ceil(images * limit)
        self.reasons: dict[str, str] = {}
        """Reason why an image cannot be read, by the image's name."""

    def add(self, name: str, reason: str) -> None:
        """Count an image, once.

        Raises:
            ValueError: there are more than the limit.
        """
        if name in self.reasons:
            return
        self.reasons[name] = reason
        print(f"skipped in training: {printable(reason)}", file=sys.stderr)
        if len(self.reasons) > self.limit:
            raise ValueError(
                f"max_damaged: expected at most {self.limit} damaged training images, got more: "
                f"{listed(list(self.reasons))}; remove or replace them, or raise the limit"
            )


def into_memory(files: FileImages, damaged: DamagedImages | None = None) -> MemoryImages:
    """Decode all images of a set once.

    Args:
        files: the images.
        damaged: counts, and leaves out, those that cannot be read; None makes them an error.

    Raises:
        ValueError: an image, or too many of them, cannot be read.
    """
    images: list[Pixels] = []
    kept: list[int] = []
    for index in range(len(files)):
        try:
            images.append(np.asarray(files.image(index)))
        except ValueError as error:
            if damaged is None:
                raise
            damaged.add(files.name(index), str(error))
            continue
        kept.append(index)
    same_size = len({image.shape for image in images}) == 1
    return MemoryImages(
        np.stack(images) if same_size else images,
        files.targets[torch.tensor(kept, dtype=torch.int64)],
        [files.name(index) for index in kept],
    )


@dataclass(frozen=True, eq=False)
class ImageSplits:
    """The training and the test images of a data set."""

    name: str
    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet

    def slice(
        self,
        *,
        train_images: int | None = None,
        test_images: int | None = None,
        holdout: float = 0.0,
    ) -> ImageSplits:
        """Returns a part of the data set, with the same share of every class, always the same one.

        A larger part contains a smaller one, and what is held out is never trained on.

        Args:
            train_images: about so many training images, at least one of each class; None for all.
            test_images: about so many test images; None for all.
            holdout: test on this share of the training images in place of the test images, to
                choose settings without looking at these; 0 <= holdout < 1.

        Raises:
            ValueError: a number is outside its range.
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout: expected 0 <= holdout < 1, got {holdout}")
        train, test = self.train, self.test
        if holdout:
            test = train.subset(_held_out(train.targets, holdout))
        kept = _kept(train.targets, "train_images", train_images, holdout)
        if len(kept) < len(train):
            train = train.subset(kept)
        if test_images is not None:
            test = test.subset(_kept(test.targets, "test_images", test_images, 0.0))
        return replace(self, train=train, test=test)

    def __str__(self) -> str:
        return (
            f"{self.name}, {len(self.class_names)} classes: "
            f"{_counts(self.train, len(self.class_names))} to train on, "
            f"{_counts(self.test, len(self.class_names))} to test on"
        )


def _shuffled_classes(targets: Tensor) -> list[list[int]]:
    """The samples of every class that occurs, each in an order of its own that never changes."""
    shuffled = []
    for target in np.unique(targets.numpy()).tolist():
        members = (targets == target).nonzero().flatten().numpy()
        generator = np.random.default_rng(derive_seed(SPLIT_SEED, target))
        shuffled.append(generator.permutation(members).tolist())
    return shuffled


def _kept(targets: Tensor, name: str, images: int | None, holdout: float) -> list[int]:
    if images is None:
        images = len(targets)
    elif not 1 <= images <= len(targets):
        raise ValueError(f"{name}: expected 1 to {len(targets)} images, got {images}")
    chosen: list[int] = []
    for members in _shuffled_classes(targets):
        wanted = max(1, round(len(members) * images / len(targets)))
        chosen += members[: min(wanted, len(members) - _held(len(members), holdout))]
    return sorted(chosen)


def _held_out(targets: Tensor, holdout: float) -> list[int]:
    chosen: list[int] = []
    for members in _shuffled_classes(targets):
        chosen += members[len(members) - _held(len(members), holdout) :]
    return sorted(chosen)


def _held(images: int, holdout: float) -> int:
    """Returns how many images of a class are held out; one at least is left to train on."""
    return min(math.ceil(images * holdout), images - 1)


def _counts(images: ImageSet, classes: int) -> str:
    counts = torch.bincount(images.targets, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    each = f"{low} of each" if low == high else f"{low} to {high} of each"
    return f"{len(images)} images ({each})"


def listed(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f", and {len(names) - NAMES_IN_MESSAGE} more" if len(names) > NAMES_IN_MESSAGE else ""
    return ", ".join(names[:NAMES_IN_MESSAGE]) + more
