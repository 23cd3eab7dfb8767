"""Labelled images that are not in folders by class: a CSV of paths, or a set of `datasets`.

A CSV has a line of titles with `path` and `label`, and may have `split`: train, test, val or
validation. Paths are relative to the folder of the file. `hf:NAME` is an image set of Hugging
Face's library: a folder of its `save_to_disk`, a parquet file, a folder that it reads, or a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from coded_resnext.files import as_text

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
    targets: Tensor
    title: str

    def source(self, index: int) -> bytes | Path:
        """Returns an encoded image, or the file that it is in."""
        (cell,) = self.table[index].values()
        return cell["bytes"] or Path(cell["path"])

    def image(self, index: int) -> Image:
        """Returns an image as 8-bit RGB; a ValueError names one that cannot be read."""
        return open_image(self.source(index), 3, self.name(index))

    def size(self, index: int) -> tuple[int, int]:
        """Returns width and height; raises as `image`."""
        return image_size(self.source(index), self.name(index))

    def name(self, index: int) -> str:
        """Returns the table's name and the row."""
        return f"{self.title} row {index}"

    def subset(self, indices: Sequence[int]) -> TableImages:
        """Returns the chosen images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, table=self.table.select(indices), targets=self.targets[chosen])

    def fingerprint(self) -> dict[str, Any]:
        """Returns their number, and digests of the classes and of the bytes of some images."""
        content = hashlib.sha256(self.targets.numpy().tobytes())
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(self))[:FILES_COMPARED]
        for index in chosen.tolist():
            source = self.source(index)
            content.update(source if isinstance(source, bytes) else source.read_bytes())
        return {"images": len(self), "content": short_digest(content)}

    def __len__(self) -> int:
        return len(self.targets)


StoredImages = FileImages | TableImages


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
    places = torch.tensor([names.index(name) for name in labels])
    sets = [
        replace(images, targets=places[images.targets]) if images else _no_images()
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
    places = {name: place for place, name in enumerate(names)}
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
    sizes = [file_size(path.parent, row["path"]) for row in rows]
    files = Files(path.parent, (row["path"] for row in rows), sizes)
    require_content(files)
    images = FileImages(files, torch.tensor([places[row["label"]] for row in rows]))
    return names, {split: images.subset(indices) for split, indices in members.items()}


def _read_table(root: str | Path) -> tuple[tuple[str, ...], dict[str, StoredImages]]:
    """Returns the same of a set of `datasets`; classes are in the order that it has."""
    name = str(root).removeprefix(HUGGING_FACE)
    splits = _load_table(name)
    labels: dict[str, list[Any]] = {}
    tables, known = {}, None
    for split, table in splits.items():
        column, label, known = _columns(root, table.features)
        feature = replace(table.features[column], decode=False)
        tables[split] = table.select_columns([column]).cast_column(column, feature)
        labels[split] = list(table[label])
        wrong = [value for value in labels[split] if value is None or value == -1]
        if wrong:
            raise ValueError(f"{as_text(root)}: expected a label of every image, got {wrong[0]}")
    if known is None:
        known = sorted({str(value) for values in labels.values() for value in values})
        places: Mapping[Any, int] = {name: place for place, name in enumerate(known)}
        labels = {s: [places[str(value)] for value in values] for s, values in labels.items()}
    parts: dict[str, StoredImages] = {}
    for split, table in tables.items():
        if split not in _SPLITS and len(splits) > 1:
            continue
        part = _SPLITS.get(split, WHOLE) if len(splits) > 1 or split != "train" else WHOLE
        title = as_text(f"{root} {split}".strip())
        parts.setdefault(part, TableImages(table, torch.tensor(labels[split]), title))
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


def _columns(root: str | Path, features: Mapping[str, Any]) -> tuple[str, str, list[str] | None]:
    """Returns the column of images, that of labels, and the names of the classes if it has any."""
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    classes = [name for name, feature in features.items() if hasattr(feature, "str2int")]
    labels = classes or [name for name in features if name == "label"]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{as_text(root)}: expected one column of images and one of labels, got "
            f"{listed([f'{name}: {type(of).__name__}' for name, of in features.items()])}"
        )
    return images[0], labels[0], list(features[labels[0]].names) if classes else None
