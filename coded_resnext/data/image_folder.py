"""Which files of a folder are images, of which class, and how one is opened: the one rule.

A folder is read with all folders inside it, and links are followed. Hidden files and folders are
left out, and `__MACOSX`, which an archive from a Mac leaves behind. Files without an image's ending
are left out and counted. What no image can come of is refused before any time is spent: links to
nothing, pipes, files that are empty or may not be read.

`pack` writes a folder once with smaller JPEGs: as a folder, or as tar shards with a table. What it
writes is whole or not there: it grows in a hidden folder beside, with which an interrupted packing
goes on, and gets its name at the end.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from coded_resnext.files import (
    LARGEST_RESULTS,
    as_text,
    parse_csv,
    read_json,
    read_text,
    write_atomically,
)

from .preprocessing import Preprocessing, stored_turn, to_channels

if TYPE_CHECKING:
    from PIL.Image import Image

    Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

TEST_FOLDERS = ("test", "val")
TRAIN_FOLDER = "train"
# Of Pillow's formats those that hold pixels; PostScript, for one, would start another program.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM"),
    *("QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM"),
)
NAMES_IN_MESSAGE = 10
READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
JPEG = (".jpg", ".jpeg")
SETTINGS_FILE = ".packing.json"
SHARD_TABLE = "images.csv"
SHARD_TITLES = ("path", "label", "split", "shard", "offset", "bytes")


class Files:
    """Paths and sizes of files, in arrays that processes share: `Path` objects each would copy.

    Args:
        root: what the names are relative to.
        names: paths below `root`.
        sizes: of the files in bytes, `[n]`.
        others: number of files beside them whose ending is no image's.
    """

    def __init__(
        self, root: Path, names: Iterable[str], sizes: Sequence[int] | Integers, others: int = 0
    ) -> None:
        encoded = list(map(os.fsencode, names))
        self.root, self.others = root, others
        self.sizes: Integers = np.asarray(sizes, dtype=np.int64)
        self.names = b"".join(encoded)
        """All names, one behind the other."""
        self.ends: Integers = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        """Where the names begin and end in `names`, `[n + 1]`."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Path:
        return self.root / self.name(range(len(self))[index])

    def name(self, index: int) -> str:
        """Returns the path of a file below `root`."""
        return os.fsdecode(self.names[self.ends[index] : self.ends[index + 1]])

    def take(self, indices: Sequence[int]) -> Files:
        """Returns the chosen files, in the order given."""
        sizes = self.sizes[np.asarray(indices, dtype=np.int64)]
        return Files(self.root, map(self.name, indices), sizes)


def list_images(root: Path, folders: Sequence[str] = ("",)) -> tuple[Files, list[int]]:
    """Returns the images anywhere below some folders, in the order of these and by name.

    Args:
        root: a folder.
        folders: names of folders in it, `""` for itself; one that is not there has no image.

    Returns:
        The files, and how many there are in each of the folders.

    Raises:
        NotADirectoryError: `root` is no folder.
        ValueError: a file is a link to nothing, no file at all, empty, or may not be read, or a
            link leads to a folder around it; the message names it.
        ImportError: Pillow is not installed.
    """
    endings = _endings(_pillow())
    names: list[str] = []
    sizes: list[int] = []
    counts, others = [], 0
    present = {"": root} | class_folders(root)
    for folder in folders:
        before = len(names)
        below = present[folder].name if folder in present and folder else ""
        for name, status in _walk(present[folder], below) if folder in present else ():
            if not name.lower().endswith(endings):
                others += 1
                continue
            names.append(name)
            sizes.append(file_size(root, name, status))
        counts.append(len(names) - before)
    files = Files(root, names, sizes, others)
    require_content(files)
    return files, counts


def file_size(root: Path, name: str, status: os.stat_result | None = None) -> int:
    """Returns the bytes of a file that may be an image.

    Args:
        root: what the name is relative to.
        name: of the file.
        status: what the system says of it, where that is known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, or may not be read.
    """
    status = status or (root / name).stat()
    # A pipe would be waited for.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{root / name}: expected an image, got something else")
    # Asked only where the mode leaves it open: one more call for each of a million files.
    if status.st_mode & READABLE != READABLE and not os.access(root / name, os.R_OK):
        raise ValueError(f"{root / name}: expected an image that may be read")
    return status.st_size


def require_content(files: Files) -> None:
    """Raises ValueError where files are empty; the message names them."""
    empty = [files.name(index) for index in (files.sizes == 0).nonzero()[0].tolist()]
    if empty:
        raise ValueError(
            f"{files.root}: expected images, got {len(empty)} empty files: {listed(empty)}; "
            "remove them or fetch them again"
        )


def _walk(
    folder: Path, name: str, around: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields the names of all files below a folder, with what the system says of each."""
    status = folder.stat()
    itself = (status.st_dev, status.st_ino)
    if itself in around:
        raise ValueError(f"{folder}: expected a folder, got a link to one around it")
    with os.scandir(folder) as entries:
        inside = sorted(
            (entry for entry in entries if not _is_hidden(entry.name)), key=lambda e: e.name
        )
    for entry in inside:
        below = f"{name}/{entry.name}" if name else entry.name
        try:
            status = entry.stat()
        except FileNotFoundError:
            raise ValueError(f"{entry.path}: expected an image, got a link to nothing") from None
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(folder / entry.name, below, (*around, itself))
        else:
            yield below, status


def find_images(paths: Sequence[str | Path]) -> Files:
    """Files as they are given; for a folder the images anywhere in it, for a CSV those it lists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder holds no image, or as `list_images`.
        ImportError: Pillow is not installed.
    """
    names: list[str] = []
    sizes: list[int] = []
    others = 0
    for path in map(Path, paths):
        if is_csv(path):
            listed_in = [path.parent / row["path"] for row in csv_rows(path, ["path"])]
            sizes += [file_size(Path(), str(name)) for name in listed_in]
            names += map(str, listed_in)
        elif path.is_dir():
            files, _ = list_images(path)
            if not len(files):
                raise ValueError(f"{path}: expected a folder with images, found none in it")
            names += (str(files[index]) for index in range(len(files)))
            sizes += files.sizes.tolist()
            others += files.others
        elif path.is_file():
            names.append(str(path))
            sizes.append(path.stat().st_size)
        else:
            kind = "something else" if path.exists() else "none"
            raise FileNotFoundError(f"{path}: expected an image or a folder, found {kind}")
    return Files(Path(), names, sizes, others)


def is_csv(path: Path) -> bool:
    """Returns whether this is a table of images."""
    return path.suffix.lower() == ".csv" and path.is_file()


def csv_rows(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Returns the lines of a table by its titles, in lower case.

    Raises:
        ValueError: it is no CSV, or a title or a cell that is required is missing.
        OSError: the file cannot be read.
    """
    try:
        titles, *rows = parse_csv(read_text(path, LARGEST_RESULTS), largest=LARGEST_RESULTS) or [[]]
        titles = [title.strip().lower() for title in titles]
        if not set(required) <= set(titles):
            raise ValueError(f"expected the titles {', '.join(required)}, got {', '.join(titles)}")
        for number, row in enumerate(rows, 2):
            if row and len(row) != len(titles):
                raise ValueError(f"line {number}: expected {len(titles)} cells, got {len(row)}")
    except ValueError as error:
        raise ValueError(f"{as_text(path)}: {as_text(error)}") from None
    labelled = [dict(zip(titles, row, strict=True)) for row in rows if row]
    for cells in labelled:
        empty = [title for title in required if not cells[title].strip()]
        if empty:
            raise ValueError(f"{as_text(path)}: expected a {empty[0]} in every line, got none")
    return labelled


def find_splits(
    root: str | Path, class_names: Sequence[str] | None = None
) -> tuple[Path | None, Path | None]:
    """Returns the folders of training and test images in a data set.

    Args:
        root: `ROOT/{train,test}/CLASS` (`val` may stand for `test`), or `ROOT/CLASS`.
        class_names: the classes of a network, where there is one. Folders with no other names make
            `root` itself the folder of test images; without a network it is that of training.

    Returns:
        Each folder, or None where there is none.

    Raises:
        NotADirectoryError: `root` is no folder.
        ValueError: there are training images and no test images for the network.
    """
    root = Path(root)
    present = class_folders(root)
    split_folders = [name for name in (TRAIN_FOLDER, *TEST_FOLDERS) if name in present]
    if class_names is not None and (not split_folders or present.keys() <= set(class_names)):
        return None, root
    train = present.get(TRAIN_FOLDER)
    test = next((present[name] for name in TEST_FOLDERS if name in present), None)
    if class_names is None and train is None:
        return (root, None) if test is None else (None, test)
    if class_names is not None and test is None:
        raise ValueError(f"{root}: expected a folder test or val beside train, found none")
    return train, test


def class_folders(root: Path) -> dict[str, Path]:
    """Returns the folders in a folder by name (see `as_text`), without hidden ones.

    Raises:
        NotADirectoryError: it is no folder.
        ValueError: it holds a link to nothing, which may have been a class.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: expected a folder of images, found none")
    paths = [path for path in sorted(root.iterdir()) if not _is_hidden(path.name)]
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: expected a folder, got a link to nothing")
    return {as_text(path.name): path for path in paths if path.is_dir()}


def open_image(source: Path | bytes, channels: int, name: str | None = None) -> Image:
    """Returns an image as 8-bit grey (1 channel) or RGB (3), read in full; see `to_channels`.

    Args:
        source: the file, or what is in one.
        channels: 1 or 3.
        name: of the image in messages; None for the file's.

    Raises:
        ValueError: it is not a readable image; the message names it.
        ImportError: Pillow is not installed.
    """
    with _opened(source, name) as image:
        return to_channels(image, channels)


def is_upright(source: Path | bytes) -> bool:
    """Returns whether an image is stored upright, see `to_channels`; False where it is none."""
    try:
        with _opened(source, "") as image:
            return stored_turn(image) is None
    except ValueError:
        return False


def image_size(source: Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Returns width and height as the header says, without decoding; as `open_image`."""
    with _opened(source, name) as image:
        width, height = image.size
        return width, height


@contextmanager
def _opened(source: Path | bytes, name: str | None) -> Iterator[Image]:
    """Opens an image, and makes of every failure a ValueError that names it."""
    image_module = _pillow()
    file = BytesIO(source) if isinstance(source, bytes) else source
    try:
        with image_module.open(file, formats=_formats(image_module)) as image:
            yield image
    # What Pillow raises depends on the format and the damage; it is no closed list.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{name or as_text(source)}: not a readable image: {as_text(reason)}"
        ) from error


def read_image(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Returns an image file as a network's input, `[C, H, W]`; raises as `open_image`."""
    return preprocessing(open_image(path, preprocessing.channels))


def listed(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f", and {len(names) - NAMES_IN_MESSAGE} more" if len(names) > NAMES_IN_MESSAGE else ""
    return ", ".join(names[:NAMES_IN_MESSAGE]) + more


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


@cache
def _endings(image_module: ModuleType) -> tuple[str, ...]:
    """Returns the endings of `FORMATS`, in lower case."""
    formats = _formats(image_module)
    registered = image_module.registered_extensions()
    return tuple(ending for ending, format_ in registered.items() if format_ in formats)


def _formats(image_module: ModuleType) -> list[str]:
    """Returns those of `FORMATS` that this Pillow reads, in the order in which it tries them."""
    image_module.init()
    return [name for name in image_module.ID if name in FORMATS]


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow; pip install pillow") from error
    return Image


def pack(
    root: Path,
    out: Path,
    *,
    shorter_side: int,
    quality: int = 90,
    shard_images: int | None = None,
    workers: int = 0,
) -> Path:
    """Writes a folder of images anew, upright in RGB, those with a longer shorter side resized.

    Images that are small enough are copied byte by byte, and so is what cannot be decoded, which
    training leaves out and counts as before.

    Args:
        root: `ROOT/{train,test,val}/CLASS` or `ROOT/CLASS`, with images anywhere below.
        out: the new folder; none may be there.
        shorter_side: pixels.
        quality: of the JPEGs, 1 to 95.
        shard_images: images in a tar file; None writes files in folders.
        workers: processes that resize; 0 resizes in this one.

    Returns:
        What training takes as its data: the folder, or the table of the shards.

    Raises:
        ValueError: a number is outside its range, there are no images, or the folder is there.
        OSError: it cannot be written; the same call goes on.
    """
    for name, number, least, most in (
        ("shorter_side", shorter_side, 1, 8192),
        ("quality", quality, 1, 95),
        ("shard_images", 1 if shard_images is None else shard_images, 1, 10**7),
        ("workers", workers, 0, 1024),
    ):
        if not least <= number <= most:
            raise ValueError(f"{name}: expected {least} to {most}, got {number}")
    if out.exists() or out.is_symlink():
        raise ValueError(f"out: {as_text(out)}: expected no such folder, there is one")
    files, _ = list_images(root)
    if not len(files):
        raise ValueError(f"{as_text(root)}: expected a folder with images, got none in it")
    growing = out.with_name(f".{out.name}.packing")
    settings: dict[str, Any] = {
        "images": len(files),
        "bytes": int(files.sizes.sum()),
        "shorter_side": shorter_side,
        "quality": quality,
        "shard_images": shard_images,
    }
    _begin(growing, settings)
    shrink = partial(smaller, shorter_side=shorter_side, quality=quality)
    if shard_images is None:
        work: Callable[[Any], int] = partial(_write_file, files, growing, shrink)
        parts: Sequence[Any] = range(len(files))
    else:
        labels = _labels(root, files)
        classes = sorted({label for _, label in labels})
        work = partial(_write_shard, files, growing, shrink, [classes.index(x) for _, x in labels])
        parts = [
            range(start, min(start + shard_images, len(files)))
            for start in range(0, len(files), shard_images)
        ]
    _in_processes(work, parts, workers, len(files))
    if shard_images is not None:
        _write_table(files, growing, labels, shard_images)
    (growing / SETTINGS_FILE).unlink()
    growing.rename(out)
    return out if shard_images is None else out / SHARD_TABLE


def smaller(path: Path, shorter_side: int, quality: int) -> tuple[bytes, str]:
    """Returns an image as it is packed, and its ending: `""` where the bytes are the file's own."""
    from PIL.Image import Resampling

    try:
        if min(image_size(path)) > shorter_side:
            image = open_image(path, 3)
            scale = shorter_side / min(image.size)
            width, height = (max(shorter_side, round(side * scale)) for side in image.size)
            buffer = io.BytesIO()
            resized = image.resize((width, height), Resampling.BICUBIC)
            resized.save(buffer, "JPEG", quality=quality)
            return buffer.getvalue(), JPEG[0]
    except ValueError:
        # Damaged; training names it.
        pass
    return path.read_bytes(), ""


def _begin(growing: Path, settings: dict[str, Any]) -> None:
    """Makes the folder that grows, or finds the one of the same packing."""
    note = growing / SETTINGS_FILE
    growing.mkdir(parents=True, exist_ok=True)
    if not note.exists():
        write_atomically(note, json.dumps(settings).encode())
    elif (begun := read_json(note)) != settings:
        raise ValueError(
            f"out: {as_text(growing)} holds another packing, {begun}, and not {settings}; remove it"
        )


def _in_processes(
    work: Callable[[Any], int], parts: Sequence[Any], workers: int, images: int
) -> None:
    """Does the work for all parts, and shows how many images are done."""
    from tqdm.auto import tqdm

    pool = ProcessPoolExecutor(workers) if workers else None
    counts: Iterable[int] = (
        pool.map(work, parts, chunksize=max(1, min(64, len(parts) // (8 * workers))))
        if pool
        else map(work, parts)
    )
    try:
        with tqdm(total=images, unit="image", disable=not sys.stderr.isatty()) as bar:
            for count in counts:
                bar.update(count)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _write_file(
    files: Files, growing: Path, shrink: Callable[[Path], tuple[bytes, str]], index: int
) -> int:
    name = files.name(index)
    # The order by name stays as it was.
    targets = [growing / (name + ending) for ending in ("", JPEG[0])]
    if not any(target.exists() for target in targets):
        content, ending = shrink(files[index])
        target = targets[bool(ending) and not name.lower().endswith(JPEG)]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
    return 1


def _write_shard(
    files: Files,
    growing: Path,
    shrink: Callable[[Path], tuple[bytes, str]],
    classes: Sequence[int],
    part: range,
) -> int:
    target = growing / _shard_name(part.start)
    if target.exists():
        return len(part)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in part:
            content, ending = shrink(files[index])
            ending = ending or Path(files.name(index)).suffix.lower()
            # A sample of WebDataset: files of one name, told apart by their endings.
            for name, data in (
                (f"{index:08d}{ending}", content),
                (f"{index:08d}.cls", str(classes[index]).encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    write_atomically(target, buffer.getvalue())
    return len(part)


def _shard_name(start: int) -> str:
    """Returns the name of a shard by the number of its first image."""
    return f"from-{start:08d}.tar"


def _labels(root: Path, files: Files) -> list[tuple[str, str]]:
    """Returns split and class of every file by the folders that it lies in; raises ValueError."""
    splits = {TRAIN_FOLDER, *TEST_FOLDERS} & class_folders(root).keys()
    labels = []
    for index in range(len(files)):
        split, *rest = Path(files.name(index)).parts
        if split not in splits:
            split, rest = TRAIN_FOLDER, [split, *rest]
        if len(rest) < 2:
            raise ValueError(
                f"{as_text(files[index])}: expected images in folders of their class, to be put "
                "into shards"
            )
        labels.append((split, as_text(rest[0])))
    return labels


def _write_table(
    files: Files, growing: Path, labels: Sequence[tuple[str, str]], shard_images: int
) -> None:
    """Writes where in the shards every image is."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SHARD_TITLES)
    for start in range(0, len(files), shard_images):
        shard = _shard_name(start)
        with tarfile.open(growing / shard) as tar:
            for entry in tar:
                if not entry.name.endswith(".cls"):
                    index = int(os.path.splitext(entry.name)[0])
                    split, label = labels[index]
                    name = as_text(files.name(index))
                    writer.writerow((name, label, split, shard, entry.offset_data, entry.size))
    write_atomically(growing / SHARD_TABLE, text.getvalue().encode())
