"""Labelled images that are not in folders by class: CSV files, and sets of `datasets`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.image_data import write_images

from coded_resnext.cli import main
from coded_resnext.data.datasets import find_image_folder, load_dataset
from coded_resnext.data.image_folder import find_images
from coded_resnext.data.image_sets import ImageSet, MemoryImages
from coded_resnext.data.labelled import images_of_no_class

COUNTS = {"cat": 5, "dog": 4}
NAMES = ("cat", "dog")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders by class, in which the tables of the tests find their images."""
    write_images(tmp_path / "pets" / "train", COUNTS)
    write_images(tmp_path / "pets" / "test", {"cat": 2, "dog": 2}, seed=1)
    return tmp_path / "pets"


def write_table(path: Path, rows: Iterable[tuple[str, ...]], titles: str = "path,label") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([titles.split(","), *rows])
    return path


def table_of(root: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    files = [p.relative_to(root) for split in splits for p in sorted((root / split).rglob("*.png"))]
    rows = [(file.as_posix(), file.parent.name, file.parts[0]) for file in files]
    return write_table(root / "labels.csv", rows, "path,label,split")


def same(one: ImageSet, other: ImageSet) -> None:
    assert one.targets.tolist() == other.targets.tolist()
    for index in range(len(one)):
        assert np.array_equal(np.asarray(one.image(index)), np.asarray(other.image(index)))


def save_table(root: Path, way: str, target: Path) -> str:
    """The folder's images as a set of `datasets`; returns its name."""
    datasets = pytest.importorskip("datasets")
    parts = {
        split: datasets.Dataset.from_dict(
            {
                "label": [NAMES.index(p.parent.name) for p in files],
                "image": [str(p) for p in files],
            },
            features=datasets.Features(
                {"label": datasets.ClassLabel(names=list(NAMES)), "image": datasets.Image()}
            ),
        )
        for split in ("train", "test")
        for files in [sorted((root / split).rglob("*.png"))]
    }
    if way == "saved":
        datasets.DatasetDict(parts).save_to_disk(target)
    else:
        target.mkdir()
        for split, part in parts.items():
            part.to_parquet(target / f"{split}-00000-of-00001.parquet")
    return f"hf:{target}"


@pytest.fixture(params=["csv", "saved", "parquet"])
def labelled(
    request: pytest.FixtureRequest, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str | Path:
    if request.param == "csv":
        return table_of(root)
    pytest.importorskip("datasets").config.HF_DATASETS_CACHE = tmp_path / "cache"
    return save_table(root, request.param, tmp_path / "table")


@pytest.mark.parametrize("storage", ["files", "memory", "auto"])
def test_the_same_images_as_in_folders(root: Path, labelled: str | Path, storage: Any) -> None:
    splits = load_dataset("folder", labelled, storage=storage)
    folder = load_dataset("folder", root, storage=storage)
    assert splits.class_names == folder.class_names
    for one, other in ((splits.train, folder.train), (splits.test, folder.test)):
        assert isinstance(one, MemoryImages) == isinstance(other, MemoryImages)
        same(one, other)
    part = splits.slice(train_images=4, holdout=0.4)
    same(part.test, folder.slice(train_images=4, holdout=0.4).test)
    assert splits.train.fingerprint() == load_dataset("folder", labelled).train.fingerprint()
    assert splits.train.fingerprint() != splits.test.fingerprint()


def test_classes_of_a_network_have_its_order(root: Path, labelled: str | Path) -> None:
    splits = find_image_folder(labelled, ("dog", "cat"))
    same(
        splits.train.subset(range(5, 9)),
        find_image_folder(root, ("dog", "cat")).train.subset(range(4)),
    )
    assert splits.test.targets.tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"training images of every class, .* got none of emu"):
        find_image_folder(labelled, ("dog", "emu", "cat"))
    with pytest.raises(ValueError, match=r"classes of the network, got also dog"):
        find_image_folder(labelled, ("cat", "emu"))


def test_images_of_no_class_come_from_tables_too(root: Path, labelled: str | Path) -> None:
    """For prediction, outside images and calibration: all splits, without labels."""
    alone = images_of_no_class([labelled])
    assert sorted(np.asarray(alone.image(i)).tobytes() for i in range(len(alone))) == sorted(
        np.asarray(Image.open(path)).tobytes() for path in root.rglob("*.png")
    )
    assert len({alone.name(i) for i in range(len(alone))}) == len(alone) == 13
    joined = images_of_no_class([labelled, root / "test", labelled])
    assert len(joined) == 13 + 4 + 13
    same(joined.subset(range(17, 30)), alone)
    chosen = joined.subset([29, 13, 0])
    assert [chosen.name(i) for i in range(3)] == [joined.name(i) for i in (29, 13, 0)]
    same(chosen.subset([0, 2]), alone.subset([12, 0]))
    assert joined.fingerprint() != alone.fingerprint()


def test_a_table_without_splits_is_like_a_plain_folder(root: Path) -> None:
    rows = [(f"train/{name}/{i:05d}.png", name) for name in NAMES for i in range(4)]
    table = write_table(root / "all.csv", rows)
    with pytest.raises(ValueError, match=r"such as --holdout 0\.2"):
        load_dataset("folder", table)
    held_out = load_dataset("folder", table, holdout=0.25)
    assert (len(held_out.train), len(held_out.test)) == (6, 2)
    for_a_network = find_image_folder(table, NAMES)
    assert (len(for_a_network.train), len(for_a_network.test)) == (0, 8)
    files = find_images([table])
    assert [files[i] for i in range(8)] == [root / path for path, _ in rows]


@pytest.mark.parametrize(
    ("titles", "rows", "message"),
    [
        ("file,label", [("a.png", "cat")], "expected the titles path, label, got file, label"),
        ("path,label", [("a.png",)], "line 2: expected 2 cells, got 1"),
        ("path,label", [("a.png", " ")], "expected a label in every line"),
        ("path,label", [("a.png", "cat"), ("a.png", "dog")], "expected each path once, got a.png"),
        ("path,label,split", [("a.png", "cat", "dev")], "split: expected one of train, test, val"),
        ("path,label", [("train", "cat")], "expected an image, got something else"),
        ("path,label", [("empty.png", "cat")], "got 1 empty files: empty.png"),
        ("path,label", [("a.png", "cat")], "of two or more, got 1 class"),
        ("path,label,split", [("a.png", "cat", "test")], "expected images to train and to test on"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    root: Path, titles: str, rows: list[tuple[str, ...]], message: str
) -> None:
    Image.new("RGB", (4, 4)).save(root / "a.png")
    (root / "empty.png").touch()
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", write_table(root / "t.csv", rows, titles), holdout=0.2)
    with pytest.raises(FileNotFoundError):
        load_dataset("folder", write_table(root / "t.csv", [("b.png", "cat")]), holdout=0.2)


def test_a_table_with_a_label_missing_or_several_columns_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = [Image.new("RGB", (4, 4))] * 2
    for columns, message in (
        ({"image": pixels, "label": ["a", None]}, "expected a label of every image, got None"),
        ({"image": pixels, "class": ["a", "b"]}, "expected one column of labels"),
        ({"text": ["x", "y"], "label": ["a", "b"]}, "expected one column of images"),
    ):
        folder = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        datasets.Dataset.from_dict(columns).save_to_disk(folder)
        with pytest.raises(ValueError, match=message):
            load_dataset("folder", f"hf:{folder}", holdout=0.2)


def test_without_the_library_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf: sets need .* install 'coded-resnext\[datasets\]'"):
        load_dataset("folder", "hf:pets")
    assert main.main(["eval", "digits", "hf:pets"]) == 2
    assert "coded-resnext[datasets]" in capsys.readouterr().err


@pytest.mark.long
def test_every_command_takes_what_training_takes(
    root: Path, labelled: str | Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train = (
        "train --config folder --model coded_resnext_digits --epochs 1 --batch-size 4 --img-size 8"
    )
    options = ["--data-dir", str(labelled), "--out", str(run), "--no-evaluation", "--workers", "0"]
    assert main.main([*train.split(), *options]) == 0, capsys.readouterr().err
    for command in (["eval", str(run), str(labelled)], ["calibrate", str(run), str(labelled)]):
        assert main.main(command) == 0, capsys.readouterr().err
    outside = ["--outside", str(labelled)]
    assert main.main(["eval", str(run), str(labelled), *outside]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main.main(["predict", str(run), str(labelled), str(root / "test")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    # Images of both splits, and those of the folder behind them.
    assert len(lines) == 9 + 4 + 4
    assert all("cat" in line or "dog" in line for line in lines)
