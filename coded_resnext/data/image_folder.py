"""Images in folders named after their classes, as a loader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .preprocessing import Preprocessing, to_channels

if TYPE_CHECKING:
    from PIL.Image import Image

TEST_FOLDERS = ("test", "val")
TRAIN_FOLDER = "train"
# Of Pillow's formats those that hold pixels; PostScript, for one, would start another program.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM"),
    *("QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM"),
)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images `ROOT/CLASS/*` in the order of classes and file names; hidden files are no images.

    Args:
        root: folder with exactly one folder for each class; other files in it do not matter.
        class_names: the classes, in the order of the model's logits.
        preprocessing: from a PIL image to `[C, H, W]`.

    Raises:
        NotADirectoryError: `root` is no folder.
        ValueError: a class has no folder or an empty one, a folder is no class, or a class folder
            holds another folder; the message names them.
        ImportError: Pillow is not installed.
    """

    def __init__(
        self, root: str | Path, class_names: Sequence[str], preprocessing: Preprocessing
    ) -> None:
        _pillow()
        self.root, self.preprocessing = Path(root), preprocessing
        found = class_folders(self.root)
        missing = [name for name in class_names if name not in found]
        extra = [name for name in found if name not in class_names]
        if missing or extra:
            raise ValueError(
                f"{self.root}: expected one folder for each of the {len(class_names)} classes of "
                f"the model; {_listed('missing', missing)}, {_listed('no such class', extra)}"
            )
        self.files = list_images(self.root, class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image `[C, H, W]` and its class; a ValueError names a file that is not readable."""
        path, target = self.files[index]
        return read_image(path, self.preprocessing), target


def list_images(
    root: Path, class_names: Sequence[str], *, all_classes: bool = True
) -> list[tuple[Path, int]]:
    """Returns the files `ROOT/CLASS/*` with their classes, in the order of classes and file names.

    Hidden files are no images.

    Args:
        root: a folder with folders of these classes.
        class_names: the classes in their order.
        all_classes: whether a class without a folder, or with an empty one, is an error.

    Raises:
        NotADirectoryError: `root` is no folder.
        ValueError: a class has no image, or a class folder holds another folder, a link to
            nothing, or a file that may not be read.
    """
    found = class_folders(root)
    listed: list[tuple[Path, int]] = []
    for index, name in enumerate(class_names):
        folder = found.get(name)
        paths = [] if folder is None else sorted(folder.iterdir())
        files = [path for path in paths if not path.name.startswith(".")]
        if all_classes and not files:
            raise ValueError(f"{root / name}: expected images of the class, got an empty folder")
        for path in files:
            if path.is_dir():
                raise ValueError(f"{path}: expected an image, got a folder")
            # A pipe would be waited for; a link that leads nowhere is noticed before days of work.
            if not path.is_file():
                kind = "something else" if path.exists() else "a link to nothing"
                raise ValueError(f"{path}: expected an image, got {kind}")
            if not os.access(path, os.R_OK):
                raise ValueError(f"{path}: expected an image, got a file that may not be read")
        listed += [(path, index) for path in files]
    return listed


def open_image(path: Path, channels: int) -> Image:
    """An image file as 8-bit grey (1 channel) or RGB (3), read in full; see `pixels.to_channels`.

    Raises:
        ValueError: the file is not a readable image; the message names it.
        ImportError: Pillow is not installed.
    """
    image_module = _pillow()
    try:
        with image_module.open(path, formats=_formats(image_module)) as image:
            return to_channels(image, channels)
    # What Pillow raises depends on the format and the damage; it is no closed list.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable image: {reason}") from error


def read_image(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Returns an image file as a network's input, `[C, H, W]`; raises as `open_image`."""
    return preprocessing(open_image(path, preprocessing.channels))


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as they are given, and in place of a folder the images anywhere in it, by name.

    In folders, hidden files and folders are left out, and files without the ending of one of
    `FORMATS`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder holds no image.
        ImportError: Pillow is not installed.
    """
    image_module = _pillow()
    formats = _formats(image_module)
    endings = {
        ending
        for ending, format_ in image_module.registered_extensions().items()
        if format_ in formats
    }
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.is_file():
                found_there = "something else" if path.exists() else "none"
                raise FileNotFoundError(
                    f"{path}: expected an image or a folder, found {found_there}"
                )
            found.append(path)
            continue
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in endings
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        )
        if not inside:
            raise ValueError(f"{path}: expected a folder with images, found none in it")
        found += inside
    return found


def image_folder(
    root: str | Path,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, int]]:
    """Returns a loader of the images `ROOT/CLASS/*`: batches `(images [B, C, H, W], targets [B])`.

    It can be iterated again and again, always in the same order.

    Args:
        root: folder with exactly one folder for each class.
        class_names: the classes, in the order of the model's logits.
        preprocessing: from a PIL image to `[C, H, W]`.
        batch_size: images in a batch, at least 1.
        workers: processes that read images; 0 reads in this one.

    Raises:
        NotADirectoryError, ValueError, ImportError: as `ImageFolder`; while iterating, a
            ValueError names a file that is not a readable image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    dataset = ImageFolder(root, class_names, preprocessing)
    # A generator of its own: otherwise every pass draws from PyTorch's default one.
    return DataLoader(
        dataset, batch_size, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )


def find_splits(root: str | Path, class_names: Sequence[str]) -> tuple[Path | None, Path]:
    """Returns the folders of training and test images in a data set.

    Args:
        root: `ROOT/CLASS/*`, or `ROOT/{train,test}/CLASS/*` (`val` may stand for `test`).
        class_names: the classes; folders named exactly so make `root` itself the test folder.

    Returns:
        The training folder, None where there is none, and the test folder.

    Raises:
        NotADirectoryError: `root` is no folder.
        ValueError: there are training images and no test images.
    """
    root = Path(root)
    found = class_folders(root)
    if set(found) == set(class_names):
        return None, root
    train = found.get(TRAIN_FOLDER)
    for name in TEST_FOLDERS:
        if name in found and name not in class_names:
            return train, found[name]
    if train is not None and TRAIN_FOLDER not in class_names:
        raise ValueError(f"{root}: expected a folder test or val beside train, found none")
    return None, root


def class_folders(root: Path) -> dict[str, Path]:
    """The folders in a folder by name, hidden ones left out; NotADirectoryError if it is none."""
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: expected a folder of images, found none")
    paths = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: expected a folder, got a link to nothing")
    # An archive from a Mac leaves this one beside the classes.
    return {path.name: path for path in paths if path.is_dir() and path.name != "__MACOSX"}


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return f"{what}: none"
    return f"{what}: {', '.join(names[:10])}{', ..' if len(names) > 10 else ''}"


def _formats(image_module: ModuleType) -> list[str]:
    """Returns those of `FORMATS` that this Pillow reads, in the order in which it tries them."""
    image_module.init()
    return [name for name in image_module.ID if name in FORMATS]


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image folders need Pillow; install coded-resnext[report]") from error
    return Image
