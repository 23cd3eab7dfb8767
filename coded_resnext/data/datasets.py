"""Data sets by name: CIFAR-10, CIFAR-100, folders of images, and a synthetic one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from coded_resnext.files import UNFIT, as_text, load_arrays

from .image_folder import Files, class_folders, find_splits, listed
from .image_sets import (
    MAX_DAMAGED,
    DamagedImages,
    FileImages,
    ImageSplits,
    MemoryImages,
    TooLargeError,
    into_memory,
)
from .labelled import StoredImages, is_labelled, labelled_splits
from .preprocessing import SPLIT_SEED, TEST_SHARE, Preprocessing

DATA_VARIABLE = "CODED_RESNEXT_DATA"
Storage = Literal["auto", "memory", "files"]
# Decoded sets up to this size stay in memory unless asked otherwise; CIFAR has 176 MiB.
MEMORY_BYTES = 512 << 20
# Images whose headers tell how large a set is.
SIZES_SAMPLED = 256
# 60,000 images, their classes, and a little more.
CIFAR_BYTES = 190 << 20
SYNTHETIC_SEED = 0
# The folders that torchvision unpacks.
_CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def data_folder(folder: str | Path | None = None) -> Path:
    """Returns the folder of data sets: the one given, `$CODED_RESNEXT_DATA`, or `data`."""
    return Path(folder or os.environ.get(DATA_VARIABLE) or "data")


def load_dataset(
    name: str,
    folder: str | Path | None = None,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    holdout: float = 0.0,
    storage: Storage = "auto",
    max_damaged: float = MAX_DAMAGED,
    download: bool = False,
) -> ImageSplits:
    """Returns a data set by name, or a part of it.

    CIFAR is looked for in this order: `FOLDER/NAME.npz` (arrays `x_train [n, 32, 32, 3]` uint8,
    `y_train`, `x_test`, `y_test`, `classes`), `FOLDER/NAME/{train,test}/CLASS/*`, and the files
    that torchvision unpacks in `FOLDER`; it is decoded in memory.

    Args:
        name: `"cifar10"`, `"cifar100"`, `"folder"` (see `find_image_folder`) or `"synthetic"`.
        folder: holds the CIFAR sets; of `"folder"` the data set itself. See `data_folder`.
        train_images, test_images, holdout: the part, see `ImageSplits.slice`.
        storage: of a folder: `"memory"` decodes all images once, `"files"` reads them anew every
            time, and `"auto"` decodes them when, by the sizes of a seeded sample, training and
            test images fit in half a gibibyte together.
        max_damaged: the largest share of the training images, and of the test images, that may be
            unreadable when they are decoded into memory; those are left out.
        download: let torchvision fetch a CIFAR set that is not there.

    Raises:
        ValueError: there is no such name, a number is outside its range, or the images are wrong;
            see `find_image_folder`.
        OSError: the images are not there.
        ImportError: torchvision or Pillow is missing.
    """
    folder = data_folder(folder)
    if storage not in get_args(Storage):
        raise ValueError(f"storage: expected one of {', '.join(get_args(Storage))}; got {storage}")
    if name in _CIFAR:
        splits = _find_cifar(name, folder, download)
        storage, max_damaged = "memory", 0
    elif name == "folder":
        splits = find_image_folder(folder, holdout=holdout)
    elif name == "synthetic":
        splits = make_synthetic()
    else:
        names = ", ".join([*_CIFAR, "folder", "synthetic"])
        raise ValueError(f"dataset: expected one of {names}; got {name!r}")
    splits = splits.slice(train_images=train_images, test_images=test_images, holdout=holdout)
    return decoded(splits, storage, max_damaged)


def find_image_folder(
    root: str | Path, class_names: Sequence[str] | None = None, *, holdout: float = 0.0
) -> ImageSplits:
    """Returns the images of a data set with labels, for training and for evaluating a network
    alike.

    Args:
        root: `ROOT/train/CLASS` with `ROOT/test/CLASS` or `ROOT/val/CLASS`, each with images in it
            or in folders inside; or `ROOT/CLASS`, of which `holdout` takes the test images, and
            which are test images alone to a network. Or a CSV of labels or `hf:NAME`, see
            `labelled.py`.
        class_names: the classes of a network; None takes the folders of training images by name.
        holdout: whether a share of the training images is going to be held out; then test images
            need not be there.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: folders are missing, a folder is none of the classes, a class has no training
            image, or a file can be no image; the message names them.
    """
    if is_labelled(root):
        labelled = labelled_splits(root, class_names, holdout=bool(holdout))
        return ImageSplits(as_text(Path(root).name), *labelled)
    root = Path(root)
    train_root, test_root = find_splits(root, class_names)
    if class_names is None and (train_root is None or not (test_root or holdout)):
        raise ValueError(
            f"{root}: expected folders train and test (or val), or classes and a share of their "
            "images to hold out, such as --holdout 0.2"
        )
    names = tuple(class_names or class_folders(train_root or root))
    if len(names) < 2:
        raise ValueError(f"{train_root}: expected folders of two classes or more, got {len(names)}")
    splits = []
    for folder, is_train in ((train_root, True), (test_root, False)):
        if folder is None:
            splits.append(FileImages(Files(root, [], []), torch.zeros(0, dtype=torch.int64)))
            continue
        unknown = [name for name in class_folders(folder) if name not in names]
        if unknown:
            raise ValueError(
                f"{folder}: expected folders of the {len(names)} classes "
                f"{'of the network' if class_names else f'in {train_root}'}, got also "
                f"{listed(unknown)}"
            )
        splits.append(FileImages.of_classes(folder, names, every_class=is_train))
    return ImageSplits(root.resolve().name, names, splits[0], splits[1])


def make_synthetic(
    classes: int = 10, size: int = 32, train_images: int = 2000, test_images: int = 500
) -> ImageSplits:
    """Returns noise in which every class brightens a patch of its own in a colour of its own.

    For trying out a recipe or a machine; the network can learn it, but it says nothing about
    accuracy. The same numbers give the same images.
    """
    generator = np.random.default_rng(SYNTHETIC_SEED)
    patch = max(1, size // 4)
    corners = generator.integers(0, size - patch + 1, (classes, 2))
    colours = generator.uniform(40, 120, (classes, 3))

    def make(images: int, split: str) -> MemoryImages:
        targets = np.arange(images) % classes
        pixels = generator.normal(100, 30, (images, size, size, 3))
        for image, target in zip(pixels, targets, strict=True):
            row, column = corners[target]
            image[row : row + patch, column : column + patch] += colours[target]
        return MemoryImages(
            pixels.clip(0, 255).astype(np.uint8),
            torch.from_numpy(targets),
            [f"synthetic {split} image {index}" for index in range(images)],
        )

    names = tuple(f"class {index}" for index in range(classes))
    return ImageSplits("synthetic", names, make(train_images, "train"), make(test_images, "test"))


def _find_cifar(name: str, folder: Path, download: bool) -> ImageSplits:
    archive = folder / f"{name}.npz"
    if archive.is_file():
        return _from_archive(archive)
    if (folder / name).is_dir():
        return find_image_folder(folder / name)
    if not download and not (folder / _CIFAR[name]).is_dir():
        raise FileNotFoundError(
            f"{folder}: expected {archive.name}, {name}/{{train,test}}/CLASS/* or {_CIFAR[name]}, "
            "found none of them; name another folder with --data-dir, or fetch it with --download"
        )
    return _from_torchvision(name, folder, download)


def _from_archive(path: Path) -> ImageSplits:
    parts = [f"{kind}_{split}" for split in ("train", "test") for kind in ("x", "y")]
    try:
        arrays = load_arrays(path, ["classes", *parts], CIFAR_BYTES)
        names = tuple(map(str, arrays["classes"].tolist()))
        splits = [
            MemoryImages(
                arrays[f"x_{split}"],
                _targets(arrays[f"y_{split}"]),
                _numbered(f"{path}: {split} image", len(arrays[f"y_{split}"])),
            )
            for split in ("train", "test")
        ]
    except UNFIT as error:
        raise ValueError(f"{path}: damaged, or not an archive of images: {error}") from error
    return ImageSplits(path.stem, names, splits[0], splits[1])


def _from_torchvision(name: str, folder: Path, download: bool) -> ImageSplits:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("CIFAR needs torchvision: pip install 'coded-resnext[train]'") from error
    load = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        loaded = [load(str(folder), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f"{folder / _CIFAR[name]}: {error}") from error
    train, test = (
        MemoryImages(
            part.data,
            _targets(part.targets),
            _numbered(f"{name} {split} image", len(part.targets)),
        )
        for part, split in zip(loaded, ("train", "test"), strict=True)
    )
    return ImageSplits(name, tuple(loaded[0].classes), train, test)


def _targets(values: Any) -> Tensor:
    # Keras stores [n, 1].
    targets = np.asarray(values, dtype=np.int64)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1 or (targets < 0).any():
        raise ValueError(f"expected class numbers [n] from 0, got {list(targets.shape)}")
    return torch.from_numpy(targets)


def _numbered(what: str, count: int) -> list[str]:
    return [f"{what} {index}" for index in range(count)]


def decoded(splits: ImageSplits, storage: Storage, max_damaged: float) -> ImageSplits:
    """Returns the images in memory where `storage` asks for it, else as they are."""
    train, test = splits.train, splits.test
    if storage == "files" or not isinstance(train, StoredImages):
        return splits
    assert isinstance(test, StoredImages)
    if storage == "auto" and _decoded_bytes(train) + _decoded_bytes(test) > MEMORY_BYTES:
        return splits
    # The headers of some are no promise of the rest.
    largest = MEMORY_BYTES if storage == "auto" else math.inf
    sets = []
    for images in (train, test):
        damaged = DamagedImages(images, max_damaged, every_class=images is train)
        try:
            sets.append((into_memory(images, damaged, largest), damaged.reasons))
        except TooLargeError:
            return splits
    return replace(splits, train=sets[0][0], test=sets[1][0], damaged=sets[0][1] | sets[1][1])


def _decoded_bytes(images: StoredImages) -> float:
    """Returns an estimate from the headers of a seeded sample of the images."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    sizes = []
    for index in order[:SIZES_SAMPLED].tolist():
        try:
            width, height = images.size(index)
        except ValueError:
            continue
        sizes.append(width * height * 3)
    return sum(sizes) / len(sizes) * len(images) if sizes else 0.0


DIGITS_NAME = "scikit-learn digits"


@dataclass(frozen=True)
class DigitsSplit:
    """scikit-learn's 1,797 handwritten digits, normalised and split; 8x8 pixels, 10 classes."""

    train_images: Tensor
    """`[1437, 1, 8, 8]`, float32."""
    train_targets: Tensor
    test_images: Tensor
    """`[360, 1, 8, 8]`, float32."""
    test_targets: Tensor
    train_indices: Tensor
    """Positions of the training images in the data set as scikit-learn returns it."""
    test_indices: Tensor
    preprocessing: Preprocessing


def load_digits_split(seed: int = SPLIT_SEED) -> DigitsSplit:
    """Returns the digits in a stratified 80/20 split, normalised by the training images.

    The set is ordered by writer, so that a sequential split would be another task: new writers.

    Raises:
        ImportError: scikit-learn is missing; the message names the extra that has it.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'coded-resnext[train]'"
        ) from error
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=TEST_SHARE,
        random_state=seed,
        stratify=digits.target,
    )
    # Sixteen grey levels, 0..16.
    intensities = torch.from_numpy(digits.images).float()[:, None] / 16
    targets = torch.from_numpy(digits.target).long()
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    preprocessing = Preprocessing(
        size=8,
        channels=1,
        mean=(float(intensities[train].mean()),),
        std=(float(intensities[train].std()),),
    )
    images = preprocessing.normalize(intensities)
    return DigitsSplit(
        images[train], targets[train], images[test], targets[test], train, test, preprocessing
    )
