"""Labelled images that are not in folders by class: a CSV of paths, or a set of `datasets`.

A CSV has a line of titles with `path` and `label`, and may have `split`: train, test, val or
validation. Paths are relative to the folder of the file. `hf:NAME` is an image set of Hugging
Face's library: a folder of its `save_to_disk`, a parquet file, a folder that it reads, or a name.
Images of unknown class come from files, folders and these alike.
"""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from coded_resnext.files import as_text, say

from .image_folder import (
    Files,
    csv_rows,
    file_size,
    image_size,
    is_csv,
    listed,
    open_image,
    require_content,
)
from .image_sets import FILES_COMPARED, FileImages, short_digest
from .preprocessing import SPLIT_SEED

if TYPE_CHECKING:
    from PIL.Image import Image

HUGGING_FACE = "hf:"
TRAIN, TEST, WHOLE = "train", "test", ""
_SPLITS = {"train": TRAIN, "test": TEST, "val": TEST, "validation": TEST}


@dataclass(frozen=True, eq=False)
class TableImages:
    """Images in a table of Hugging Face's `datasets`, which are decoded every time."""

    table: Any
    """A `datasets.Dataset` with one column, of images as they were encoded."""
    rows: Tensor
    """Of the images in the table, `[n]`, int64."""
    targets: Tensor
    title: str

    def encoded(self, index: int) -> bytes | Path:
        """Returns an encoded image, or the file that it is in."""
        (cell,) = self.table[int(self.rows[index])].values()
        return cell["bytes"] or Path(cell["path"])

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""
        return open_image(self.encoded(index), 3, self.name(index))

    def size(self, index: int) -> tuple[int, int]:
        """Returns width and height; raises as `image`."""
        return image_size(self.encoded(index), self.name(index))

    def name(self, index: int) -> str:
        """Returns the table's name and the row."""
        return f"{self.title} row {int(self.rows[index])}"

    def address(self, index: int) -> str:
        """Returns the same."""
        return self.name(index)

    def subset(self, indices: Sequence[int]) -> TableImages:
        """Returns the chosen images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, rows=self.rows[chosen], targets=self.targets[chosen])

    def fingerprint(self) -> dict[str, Any]:
        """Returns their number, and digests of the classes and of the bytes of some images."""
        content = hashlib.sha256(self.targets.numpy().tobytes())
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(self))[:FILES_COMPARED]
        for index in chosen.tolist():
            source = self.encoded(index)
            content.update(source if isinstance(source, bytes) else source.read_bytes())
        return {"images": len(self), "content": short_digest(content)}

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class ShardImages:
    """Images inside tar files, which a table says the positions of; see `image_folder.pack`."""

    files: Files
    """Their names and sizes, below the folder of the table."""
    shards: tuple[Path, ...]
    locations: Tensor
    """Which shard, and the first byte in it, `[n, 2]`, int64."""
    targets: Tensor

    def encoded(self, index: int) -> bytes:
        """Returns what was in the file; a ValueError names one that cannot be read."""
        shard, offset = self.locations[index].tolist()
        try:
            with self.shards[shard].open("rb") as file:
                file.seek(offset)
                content: bytes = file.read(int(self.files.sizes[index]))
                return content
        except OSError as error:
            raise ValueError(f"{self.name(index)}: not a readable image: {error}") from error

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""
        return open_image(self.encoded(index), 3, self.name(index))

    def size(self, index: int) -> tuple[int, int]:
        """Returns width and height; raises as `image`."""
        return image_size(self.encoded(index), self.name(index))

    def name(self, index: int) -> str:
        """Returns the path that the image had in its folder, see `as_text`."""
        return as_text(self.files[index])

    def address(self, index: int) -> str:
        """Returns the same."""
        return self.name(index)

    def subset(self, indices: Sequence[int]) -> ShardImages:
        """Returns the chosen images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        files, locations = self.files.take(indices), self.locations[chosen]
        return ShardImages(files, self.shards, locations, self.targets[chosen])

    def fingerprint(self) -> dict[str, Any]:
        """Returns their number, and digests of names, classes, sizes and the bytes of some."""
        names = hashlib.sha256(self.files.names)
        names.update(self.files.ends.tobytes() + self.targets.numpy().tobytes())
        content = hashlib.sha256(self.files.sizes.tobytes())
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(self))[:FILES_COMPARED]
        for index in chosen.tolist():
            content.update(self.encoded(index))
        return {"images": len(self), "names": short_digest(names), "content": short_digest(content)}

    def __len__(self) -> int:
        return len(self.targets)


StoredImages = FileImages | TableImages | ShardImages


class JoinedImages:
    """The images of several sets, one set behind the other."""

    def __init__(self, sets: Sequence[ImagesOfNoClass]) -> None:
        self.sets = sets
        self.ends = list(accumulate(map(len, sets)))
        """Positions behind the last image of each set."""
        self.targets: Tensor = torch.cat([images.targets for images in sets])

    def _locate(self, index: int) -> tuple[ImagesOfNoClass, int]:
        which = bisect_right(self.ends, index)
        return self.sets[which], index - (self.ends[which] - len(self.sets[which]))

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""
        images, position = self._locate(index)
        return images.image(position)

    def encoded(self, index: int) -> Path | bytes:
        """Returns an encoded image, or the file that it is in."""
        images, position = self._locate(index)
        return images.encoded(position)

    def name(self, index: int) -> str:
        """Returns the name that an image has in its set."""
        images, position = self._locate(index)
        return images.name(position)

    def address(self, index: int) -> str:
        """Returns the address that an image has in its set."""
        images, position = self._locate(index)
        return images.address(position)

    def subset(self, indices: Sequence[int]) -> JoinedImages:
        """Returns the chosen images, in the order given."""
        runs = groupby(map(self._locate, indices), key=lambda located: located[0])
        return JoinedImages(
            [images.subset([position for _, position in run]) for images, run in runs]
        )

    def fingerprint(self) -> dict[str, Any]:
        """Returns their number, and a digest of the fingerprints of all sets."""
        content = hashlib.sha256(repr([images.fingerprint() for images in self.sets]).encode())
        return {"images": len(self), "content": short_digest(content)}

    def __len__(self) -> int:
        return self.ends[-1]


ImagesOfNoClass: TypeAlias = "FileImages | TableImages | JoinedImages"


def images_of_no_class(paths: Sequence[str | Path]) -> ImagesOfNoClass:
    """Returns images of unknown class, as class 0, and says how many other files are left out.

    Args:
        paths: image files, folders with some in them, CSVs with a column `path`, and `hf:NAME`,
            of which all splits are taken.

    Raises:
        OSError, ValueError, ImportError: as `find_images` and `labelled_splits`; a ValueError also
            where there is no path.
    """
    sets: list[ImagesOfNoClass] = []
    for is_table, group in groupby(paths, lambda path: str(path).startswith(HUGGING_FACE)):
        if is_table:
            sets += [images for root in group for images in _tables_of_no_class(root)]
            continue
        files = FileImages.of_no_class(list(group))
        if files.files.others:
            say(f"{files.files.others} other files left out", file=sys.stderr)
        sets.append(files)
    if not sets:
        raise ValueError("images: expected at least one file or folder, got none")
    return sets[0] if len(sets) == 1 else JoinedImages(sets)


def _tables_of_no_class(root: str | Path) -> list[TableImages]:
    """Returns the images of every split of a set of `datasets`."""
    tables = []
    for split, table in _load_table(str(root).removeprefix(HUGGING_FACE)).items():
        targets = torch.zeros(len(table), dtype=torch.int64)
        tables.append(_table_images(root, split, table, targets))
    return tables


def is_labelled(root: str | Path) -> bool:
    """Returns whether this is a CSV of labels or a set of `datasets`, not a folder of classes."""
    return str(root).startswith(HUGGING_FACE) or is_csv(Path(root))


def labelled_splits(
    root: str | Path, class_names: Sequence[str] | None, *, holdout: bool
) -> tuple[tuple[str, ...], StoredImages, StoredImages]:
    """Returns the classes, the training and the test images of a labelled set.

    Args:
        root: the CSV, or `hf:NAME`.
        class_names: the classes of a network, to which images without a split are test images;
            without a network they are training images.
        holdout: whether training images are going to be held out.

    Raises:
        ValueError: images are missing, or their labels do not fit; the message names them.
        OSError: a file is not there or cannot be read.
        ImportError: Hugging Face's `datasets` is not installed.
    """
    read = _read_csv if is_csv(Path(root)) else _read_table
    labels, parts = read(root)
    names = tuple(class_names or labels)
    title = as_text(root)
    if class_names is None:
        train, test = parts.get(TRAIN, parts.get(WHOLE)), parts.get(TEST)
        if train is None or not (test or holdout):
            raise ValueError(
                f"{title}: expected images to train and to test on by their split, or a share of "
                "the training images to hold out, such as --holdout 0.2"
            )
    else:
        train, test = parts.get(TRAIN), parts.get(TEST, parts.get(WHOLE))
        if test is None:
            raise ValueError(f"{title}: expected images to test on, got training images alone")
    unknown = [name for name in labels if name not in names]
    if unknown:
        raise ValueError(
            f"{title}: expected labels of the {len(names)} classes of the network, "
            f"got also {listed(unknown)}"
        )
    indices = torch.tensor([names.index(name) for name in labels])
    sets = [
        replace(images, targets=indices[images.targets]) if images else _no_images()
        for images in (train, test)
    ]
    counts = torch.bincount(sets[0].targets, minlength=len(names)).tolist()
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    if train is not None and (missing or len(names) < 2):
        wrong = f"none of {listed(missing)}" if missing else f"{len(names)} class"
        raise ValueError(
            f"{title}: expected training images of every class, of two or more, got {wrong}"
        )
    return names, sets[0], sets[1]


def _no_images() -> FileImages:
    return FileImages(Files(Path(), [], []), torch.zeros(0, dtype=torch.int64))


def _read_csv(root: str | Path) -> tuple[tuple[str, ...], dict[str, StoredImages]]:
    """Returns the classes by name, and the images by split; `WHOLE` where there are no splits."""
    path = Path(root)
    rows = csv_rows(path, ("path", "label"))
    names = tuple(sorted({row["label"] for row in rows}))
    indices = {name: index for index, name in enumerate(names)}
    seen: dict[str, int] = {}
    members: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if seen.setdefault(row["path"], index) != index:
            raise ValueError(f"{as_text(path)}: expected each path once, got {row['path']} twice")
        split = row.get("split", "").strip().lower()
        if "split" in row and split not in _SPLITS:
            raise ValueError(
                f"{as_text(path)}: split: expected one of {', '.join(_SPLITS)}; got {split!r:.80}"
            )
        members.setdefault(_SPLITS.get(split, WHOLE), []).append(index)
    targets = torch.tensor([indices[row["label"]] for row in rows])
    images: StoredImages
    if "shard" in (rows[0] if rows else {}):
        images = _in_shards(path, rows, targets)
    else:
        sizes = [file_size(path.parent, row["path"]) for row in rows]
        files = Files(path.parent, (row["path"] for row in rows), sizes)
        require_content(files)
        images = FileImages(files, targets)
    return names, {split: images.subset(indices) for split, indices in members.items()}


def _in_shards(path: Path, rows: Sequence[dict[str, str]], targets: Tensor) -> ShardImages:
    """Returns the images of a table with the titles shard, offset and bytes."""
    ends = {name: file_size(path.parent, name) for name in {row["shard"] for row in rows}}
    names = sorted(ends)
    order = {name: number for number, name in enumerate(names)}
    locations, sizes = [], []
    for row in rows:
        numbers = [row.get(title, "") for title in ("offset", "bytes")]
        if not all(number.isdecimal() and len(number) < 16 for number in numbers):
            raise ValueError(
                f"{as_text(path)}: {row['path']}: expected an offset and bytes, got {numbers}"
            )
        offset, size = map(int, numbers)
        if not size or offset + size > ends[row["shard"]]:
            raise ValueError(
                f"{as_text(path)}: {row['path']}: expected bytes inside {row['shard']} of "
                f"{ends[row['shard']]:,} bytes, got {size:,} from {offset:,} on"
            )
        locations.append((order[row["shard"]], offset))
        sizes.append(size)
    files = Files(path.parent, (row["path"] for row in rows), sizes)
    shards = tuple(path.parent / name for name in names)
    return ShardImages(files, shards, torch.tensor(locations), targets)


def _read_table(root: str | Path) -> tuple[tuple[str, ...], dict[str, StoredImages]]:
    """Returns the same of a set of `datasets`; classes are in the order that it has."""
    name = str(root).removeprefix(HUGGING_FACE)
    splits = _load_table(name)
    labels: dict[str, list[Any]] = {}
    known = None
    for split, table in splits.items():
        label, known = _label(root, table.features)
        labels[split] = list(table[label])
        wrong = [value for value in labels[split] if value is None or value == -1]
        if wrong:
            raise ValueError(f"{as_text(root)}: expected a label of every image, got {wrong[0]}")
    if known is None:
        known = sorted({str(value) for values in labels.values() for value in values})
        indices: Mapping[Any, int] = {name: index for index, name in enumerate(known)}
        labels = {s: [indices[str(value)] for value in values] for s, values in labels.items()}
    parts: dict[str, StoredImages] = {}
    for split, table in splits.items():
        if split not in _SPLITS and len(splits) > 1:
            continue
        part = _SPLITS.get(split, WHOLE) if len(splits) > 1 or split != "train" else WHOLE
        targets = torch.tensor(labels[split])
        parts.setdefault(part, _table_images(root, split, table, targets))
    return tuple(known), parts


def _load_table(name: str) -> dict[str, Any]:
    """Returns the tables of a set by split."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "hf: sets need Hugging Face's datasets: pip install 'coded-resnext[datasets]'"
        ) from error
    path = Path(name)
    try:
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        elif path.suffix == ".parquet" and path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=name)
        else:
            loaded = datasets.load_dataset(name)
        splits = loaded if isinstance(loaded, dict) else {"": loaded}
        return {str(split): table for split, table in splits.items()}
    # What the library raises depends on the file, the Hub and the version; it is no closed list.
    except Exception as error:
        raise ValueError(f"hf:{as_text(name)}: {as_text(error)}") from error


def _table_images(root: str | Path, split: str, table: Any, targets: Tensor) -> TableImages:
    """Returns the images of a table, which are not decoded before they are asked for."""
    columns = [name for name, of in table.features.items() if type(of).__name__ == "Image"]
    column = _only_one(root, table.features, columns, "images")
    feature = replace(table.features[column], decode=False)
    encoded = table.select_columns([column]).cast_column(column, feature)
    title = as_text(f"{root} {split}".strip())
    return TableImages(encoded, torch.arange(len(table)), targets, title)


def _label(root: str | Path, features: Mapping[str, Any]) -> tuple[str, list[str] | None]:
    """Returns the column of labels, and the names of the classes if it has any."""
    classes = [name for name, feature in features.items() if hasattr(feature, "str2int")]
    columns = classes or [name for name in features if name == "label"]
    column = _only_one(root, features, columns, "labels")
    return column, list(features[column].names) if classes else None


def _only_one(
    root: str | Path, features: Mapping[str, Any], columns: Sequence[str], of: str
) -> str:
    """Returns the only column of its kind; a ValueError lists all columns where it is not alone."""
    if len(columns) != 1:
        raise ValueError(
            f"{as_text(root)}: expected one column of {of}, got "
            f"{listed([f'{name}: {type(kind).__name__}' for name, kind in features.items()])}"
        )
    return columns[0]
