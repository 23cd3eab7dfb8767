"""A folder of images written once with smaller JPEGs: as a folder, or as tar shards with a table.

What is written is whole or not there: it grows in a hidden folder beside, with which an interrupted
packing goes on, and gets its name at the end.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from coded_resnext.files import as_text, read_json, write_atomically

from .image_folder import (
    TEST_FOLDERS,
    TRAIN_FOLDER,
    Files,
    class_folders,
    image_size,
    list_images,
    open_image,
)

JPEG = (".jpg", ".jpeg")
SETTINGS_FILE = ".packing.json"
SHARD_TABLE = "images.csv"
SHARD_TITLES = ("path", "label", "split", "shard", "offset", "bytes")


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
    """Returns the name of a shard by the place of its first image."""
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
