"""Sets of RGB images with targets: in files, or decoded in memory."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coded_resnext.files import as_text, say

from .image_folder import Files, find_images, image_size, list_images, listed, open_image
from .preprocessing import SPLIT_SEED, derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    from .image_folder import Integers

    Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

# Largest share of images that may be unreadable, unless asked otherwise.
MAX_DAMAGED = 0.01
# Files whose bytes are compared when a run is resumed; of all others the size is.
FILES_COMPARED = 64


class ImageSet(Protocol):
    """Images with targets, read one by one."""

    @property
    def targets(self) -> Tensor:
        """Class indices `[n]`, int64."""

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""

    def encoded(self, index: int) -> Path | bytes | Image:
        """Returns an image as it is kept: its file, what is in one, or 8-bit RGB."""

    def name(self, index: int) -> str:
        """Returns the name of an image in messages: its file, where it has one."""

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Returns the chosen images, in the order given."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells these images from others, JSON-ready."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images that are read from their files every time."""

    files: Files
    targets: Tensor

    @classmethod
    def of_classes(cls, root: Path, class_names: Sequence[str], *, every_class: bool) -> FileImages:
        """Returns the images below `ROOT/CLASS`, in the order of the classes.

        Args:
            root: the folder; a class may lack there, and other folders do not matter.
            class_names: the classes in their order.
            every_class: whether a class without an image is an error.

        Raises:
            NotADirectoryError, ValueError, ImportError: as `list_images`; a ValueError names a
                class without an image.
        """
        files, counts = list_images(root, class_names)
        missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
        if every_class and missing:
            raise ValueError(
                f"{root}: expected images of every class, got none of {listed(missing)}"
                + _others(files)
            )
        targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return cls(files, targets)

    @classmethod
    def of_no_class(cls, paths: Sequence[str | Path]) -> FileImages:
        """Returns images of unknown class, as class 0; raises as `find_images`."""
        files = find_images(paths)
        return cls(files, torch.zeros(len(files), dtype=torch.int64))

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""
        return open_image(self.files[index], channels=3)

    def encoded(self, index: int) -> Path:
        """Returns the file."""
        return self.files[index]

    def size(self, index: int) -> tuple[int, int]:
        """Returns width and height; raises as `image`."""
        return image_size(self.files[index])

    def name(self, index: int) -> str:
        """Returns the path of the file, see `as_text`."""
        return as_text(self.files[index])

    def address(self, index: int) -> str:
        """Returns the path of the file as the system has it."""
        return str(self.files[index])

    def subset(self, indices: Sequence[int]) -> FileImages:
        """Returns the chosen images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return FileImages(self.files.take(indices), self.targets[chosen])

    def fingerprint(self) -> dict[str, Any]:
        """Returns their number, and digests of names, classes, sizes and the bytes of some files.

        It does not depend on where the folder lies.
        """
        names = hashlib.sha256(self.files.names)
        names.update(self.files.ends.tobytes() + self.targets.numpy().tobytes())
        content = hashlib.sha256(self.files.sizes.tobytes())
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(self))[:FILES_COMPARED]
        for index in chosen.tolist():
            try:
                content.update(self.files[index].read_bytes())
            # Reading it in training is where this is noticed.
            except OSError:
                content.update(b"unreadable")
        return {"images": len(self), "names": short_digest(names), "content": short_digest(content)}

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images decoded in memory."""

    images: Pixels | Sequence[Pixels]
    """`[n, H, W, 3]`, uint8, or where sizes differ n arrays `[H, W, 3]`."""
    targets: Tensor
    names: Sequence[str]
    source: ImageSet | None = None
    """The set that they were decoded from."""

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
        """Returns all images as one tensor `[n, 3, H, W]`, uint8; a ValueError where sizes
        differ."""
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

    encoded = image

    def name(self, index: int) -> str:
        """Returns the file that the image came from, or its position in one."""
        return self.names[index]

    def subset(self, indices: Sequence[int]) -> MemoryImages:
        """Returns the chosen images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = (
            self.images[chosen.numpy()]
            if isinstance(self.images, np.ndarray)
            else [self.images[index] for index in indices]
        )
        return MemoryImages(
            images,
            self.targets[chosen],
            [self.names[i] for i in indices],
            self.source and self.source.subset(indices),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of the files they came from, or their number and a digest of all bytes."""
        if self.source is not None:
            return self.source.fingerprint()
        content = hashlib.sha256(self.targets.numpy().tobytes())
        for image in self.images:
            content.update(np.ascontiguousarray(image).data)
        return {"images": len(self), "content": short_digest(content)}

    def __len__(self) -> int:
        return len(self.images)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function of an image returns, or the ValueError that says what is wrong."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


class DamagedImages:
    """Counts and names images of a set that cannot be read, and refuses too many of them.

    They are left out, in training, evaluation and prediction alike.

    Args:
        images: the set.
        limit: largest share of it that may be damaged, 0 to 1; rounded up to whole images.
        every_class: whether a class that is left without an image is an error too.
    """

    def __init__(
        self, images: ImageSet, limit: float = MAX_DAMAGED, *, every_class: bool = False
    ) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"max_damaged: expected a share from 0 to 1, got {limit}")
        self.images, self.share, self.limit = images, limit, math.ceil(len(images) * limit)
        self.reasons: dict[str, str] = {}
        """Reason why an image cannot be read, by the image's name."""
        self._left = torch.bincount(images.targets).tolist() if every_class else None

    def add(self, index: int, reason: str) -> None:
        """Counts an image, once.

        Raises:
            ValueError: there are more than the limit, or it was the last one of its class.
        """
        name = self.images.name(index)
        if name in self.reasons:
            return
        self.reasons[name] = reason
        say(f"left out: {reason}", file=sys.stderr)
        if len(self.reasons) > self.limit:
            raise ValueError(
                f"max_damaged: expected at most {self.limit} damaged images, got more: "
                f"{listed(list(self.reasons))}; remove or replace them, or raise the limit"
            )
        if self._left is not None:
            target = int(self.images.targets[index])
            self._left[target] -= 1
            if not self._left[target]:
                raise ValueError(
                    f"{name}: expected a readable image of every class, this was its class's last"
                )

    def __str__(self) -> str:
        return f"{len(self.reasons)} damaged images left out: {listed(list(self.reasons))}"


class TooLargeError(ValueError):
    """The images of a set do not fit where they are to go."""


def into_memory(files: ImageSet, damaged: DamagedImages, largest: float = math.inf) -> MemoryImages:
    """Decodes all images of a set once.

    Args:
        files: the images.
        damaged: counts those that cannot be read, which are left out.
        largest: bytes of all of them.

    Raises:
        TooLargeError: as soon as they are larger than that.
        ValueError: too many of them cannot be read.
    """
    images: list[Pixels] = []
    kept: list[int] = []
    total = 0
    for index in range(len(files)):
        try:
            images.append(np.asarray(files.image(index)))
            kept.append(index)
        except ValueError as error:
            damaged.add(index, str(error))
            continue
        total += images[-1].nbytes
        if total > largest:
            raise TooLargeError(f"images: expected at most {largest} bytes of pixels, got more")
    source = files.subset(kept)
    names = [source.name(index) for index in range(len(source))]
    if len({image.shape for image in images}) != 1:
        return MemoryImages(images, source.targets, names, source)
    # Each is let go as it is copied: two copies of a whole set may be more than there is room for.
    pixels = np.empty((len(images), *images[0].shape), np.uint8)
    for index in reversed(range(len(images))):
        pixels[index] = images.pop()
    return MemoryImages(pixels, source.targets, names, source)


@dataclass(frozen=True, eq=False)
class ImageSplits:
    """The training and the test images of a data set."""

    name: str
    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Why images were left out that could not be decoded, by their names."""

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
            holdout: test on this share of the training images instead of the test images, to
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
        sets = [(images, use) for images, use in ((self.train, "train"), (self.test, "test"))]
        parts = [
            f"{_counts(images, len(self.class_names))} to {use} on"
            for images, use in sets
            if len(images)
        ]
        return f"{self.name}, {len(self.class_names)} classes: {', '.join(parts)}"


def by_class(targets: Tensor) -> dict[int, Integers]:
    """Returns the indices of the samples of every class that occurs, ascending, by one sort."""
    order = np.argsort(targets.numpy(), kind="stable")
    classes, starts = np.unique(targets.numpy()[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))


def _shuffled_classes(targets: Tensor) -> list[Integers]:
    """Returns the samples of every class, each in an order of its own that never changes."""
    return [
        np.random.default_rng(derive_seed(SPLIT_SEED, target)).permutation(members)
        for target, members in by_class(targets).items()
    ]


def _kept(targets: Tensor, name: str, images: int | None, holdout: float) -> list[int]:
    if images is None:
        images = len(targets)
    elif not 1 <= images <= len(targets):
        raise ValueError(f"{name}: expected 1 to {len(targets)} images, got {images}")
    if images == len(targets) and not holdout:
        return list(range(images))
    chosen = []
    for members in _shuffled_classes(targets):
        wanted = max(1, round(len(members) * images / len(targets)))
        chosen.append(members[: min(wanted, len(members) - _held(len(members), holdout))])
    return np.sort(np.concatenate(chosen)).tolist()  # type: ignore[no-any-return]


def _held_out(targets: Tensor, holdout: float) -> list[int]:
    chosen = [
        members[len(members) - _held(len(members), holdout) :]
        for members in _shuffled_classes(targets)
    ]
    return np.sort(np.concatenate(chosen)).tolist()  # type: ignore[no-any-return]


def _held(images: int, holdout: float) -> int:
    """Returns how many images of a class are held out; one at least is left to train on."""
    return min(math.ceil(images * holdout), images - 1)


def _counts(images: ImageSet, classes: int) -> str:
    counts = torch.bincount(images.targets, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    each = f"{low} of each" if low == high else f"{low} to {high} of each"
    return f"{len(images)} images ({each}){_others(images)}"


def _others(images: ImageSet | Files) -> str:
    """Says how many files beside the images are none."""
    files = images.files if isinstance(images, FileImages) else images
    others = files.others if isinstance(files, Files) else 0
    return f", {others} other files left out" if others else ""


def short_digest(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:16]
