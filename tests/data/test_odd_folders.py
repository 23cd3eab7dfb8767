"""Folders as people have them: one outcome for each kind, by every command that reads images."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.small_networks import NAMES, make_network

from coded_resnext.cli import main
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.datasets import find_image_folder, load_dataset
from coded_resnext.data.image_sets import DamagedImages, FileImages
from coded_resnext.data.loaders import EvalImages, TrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.interpret.evaluate import evaluate
from coded_resnext.models.checkpoint import save_model

ROOT = Path(__file__).parents[2]
COLOUR = Preprocessing(8, 3, (0.5,) * 3, (0.25,) * 3)
CLASSES = ("ant", "bee")
_FILE = BytesIO()
Image.new("RGB", (8, 8), (200, 100, 50)).save(_FILE, "PNG")
PICTURE = _FILE.getvalue()
# Where files need no disk, thousands of trees take a third of the time.
TREES = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
# Images of each class in each split; the odd thing comes on top.
GOOD = 4


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURE)


def good_folder(root: Path) -> Path:
    for split in ("train", "test"):
        for name in CLASSES:
            for index in range(GOOD):
                picture(root / split / name / f"m{index}.png")
    return root


def linked(folder: Path) -> None:
    outside = folder.parents[2] / f"elsewhere-{folder.parent.name}"
    picture(outside / "b.png")
    (folder / "linked").symlink_to(outside)


def linked_file(folder: Path) -> None:
    outside = folder.parents[2] / f"else-{folder.parent.name}.png"
    picture(outside)
    (folder / "z.png").symlink_to(outside)


# What is put into the class `ant` of both splits.
KINDS: dict[str, Callable[[Path], object]] = {
    "`2019/x.jpg`, a folder inside": lambda folder: picture(folder / "2019" / "x.jpg"),
    "a link to an image": linked_file,
    "a link to a folder of images": linked,
    "a name that is not UTF-8": lambda folder: picture(folder / os.fsdecode(b"caf\xe9.png")),
    "a name of two lines": lambda folder: picture(folder / "two\nlines.png"),
    "PNG under another ending": lambda folder: picture(folder / "x.JPEG"),
    "`._a.png`, a hidden file": lambda folder: picture(folder / "._a.png"),
    "`.ipynb_checkpoints/a.png`, a hidden folder": lambda folder: picture(
        folder / ".ipynb_checkpoints" / "a.png"
    ),
    "`__MACOSX/a.png`": lambda folder: picture(folder / "__MACOSX" / "a.png"),
    "an empty folder inside": lambda folder: (folder / "empty").mkdir(),
    "`Thumbs.db`, another ending": lambda folder: (folder / "Thumbs.db").write_text("x"),
    "a damaged image": lambda folder: (folder / "z.png").write_bytes(b"no image"),
    "an empty file": lambda folder: (folder / "z.png").touch(),
    "a link to nothing": lambda folder: (folder / "z.png").symlink_to("nowhere.png"),
    "a link to a folder around it": lambda folder: (folder / "up").symlink_to(".."),
    "a pipe": lambda folder: os.mkfifo(folder / "z.png"),
}


def train_on(root: Path) -> Iterator[tuple[int, bool]]:
    """How many images each set has, and whether others are counted; all of them are read."""
    splits = load_dataset("folder", root, storage="files")
    loader = TrainImages(splits.train, TrainTransform(Augmentation(), COLOUR), 2, seed=0)
    list(loader)
    tested = sum(len(x) for x, _ in EvalImages(splits.test, COLOUR))
    yield len(splits.train) - len(loader.damaged.reasons), "other files" in str(splits)
    yield tested, "other files" in str(splits)


def decode(root: Path) -> Iterator[tuple[int, bool]]:
    splits = load_dataset("folder", root, storage="memory")
    found = find_image_folder(root)
    for images in (splits.train, splits.test):
        yield len(images), "other files" in str(found)


def evaluate_on(root: Path) -> Iterator[tuple[int, bool]]:
    splits = find_image_folder(root, CLASSES)
    for images in (splits.train, splits.test):
        yield sum(len(x) for x, _ in EvalImages(images, COLOUR)), "other files" in str(splits)


def classify(root: Path) -> Iterator[tuple[int, bool]]:
    for split in ("train", "test"):
        images = FileImages.of_no_class([root / split])
        yield sum(len(x) for x, _ in EvalImages(images, COLOUR)), bool(images.files.others)


COMMANDS: dict[str, Callable[[Path], Iterator[tuple[int, bool]]]] = {
    "training, `files`": train_on,
    "training, `memory`": decode,
    "`eval`": evaluate_on,
    "`predict`, `--outside`, `--int8`": classify,
}


def outcome(command: str, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What becomes of the odd thing, in both splits alike."""
    capsys.readouterr()
    try:
        results = set(COMMANDS[command](root))
    except ValueError:
        return "refused"
    [(count, counted)] = results
    said = "named" if "left out: " in capsys.readouterr().err else "counted" if counted else ""
    if count > GOOD * len(CLASSES):
        assert not said
        return "read"
    assert count == GOOD * len(CLASSES)
    return f"left out, {said}" if said else "left out"


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    lines = [f"| in the folder of a class | {' | '.join(COMMANDS)} |"]
    lines.append("|---" * (1 + len(COMMANDS)) + "|")
    for number, (kind, put) in enumerate(KINDS.items()):
        root = good_folder(tmp_path / str(number) / "data")
        for split in ("train", "test"):
            put(root / split / "ant")
        cells = [outcome(command, root, capsys) for command in COMMANDS]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_every_command_reads_a_folder_alike(table: str) -> None:
    """vision#4925, #2831, timm#334, ultralytics#14301, SimpleTuner#94: two readers, two rules.

    docs/reliability.md has the table as it comes out here.
    """
    print(table)
    assert table in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for row in table.splitlines()[2:]:
        assert len({cell.strip(" |") for cell in row.split(" | ")[1:]}) == 1, row


def test_a_class_may_be_missing_in_the_test_images(tmp_path: Path) -> None:
    """vision#8297, timm#957: `eval` refused the folder that training takes and evaluates."""
    root = good_folder(tmp_path / "data")
    shutil.rmtree(root / "test" / "bee")
    assert load_dataset("folder", root).test.targets.unique().tolist() == [0]
    for folder in (root, root / "test"):
        splits = find_image_folder(folder, CLASSES)
        assert splits.test.targets.tolist() == [0] * GOOD
    # A class without a training image is refused by both.
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    for names in (None, CLASSES):
        with pytest.raises(ValueError, match="images of every class, got none of bee"):
            find_image_folder(root, names)


def test_a_folder_of_classes_alone_is_split_by_holdout(tmp_path: Path) -> None:
    """torchvision's and timm's form of a data set: `ROOT/CLASS/*`."""
    root = good_folder(tmp_path / "data") / "train"
    with pytest.raises(ValueError, match="--holdout"):
        load_dataset("folder", root)
    splits = load_dataset("folder", root, holdout=0.25)
    assert splits.class_names == CLASSES
    assert splits.test.targets.tolist() == [0, 1]
    assert splits.train.targets.tolist() == [0] * 3 + [1] * 3
    names = [{s.name(i) for i in range(len(s))} for s in (splits.train, splits.test)]
    assert not names[0] & names[1]
    # To a network it is test images.
    of_network = find_image_folder(root, CLASSES)
    assert (len(of_network.train), len(of_network.test)) == (0, 2 * GOOD)


def test_one_damaged_image_does_not_move_the_thresholds(tmp_path: Path) -> None:
    """gigagan-pytorch#27: they were chosen on the test images, "as no training data is at hand"."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                noise = generator.integers(0, 256, (6, 6), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / split / name / f"{index}.png")
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"no image")
    splits = find_image_folder(tmp_path, NAMES)
    grey = Preprocessing(6, 1, (0.5,), (0.25,))
    train, test = (EvalImages(images, grey, 4) for images in (splits.train, splits.test))
    evaluation = evaluate(make_network(), train, test, repeats=1)
    assert (evaluation.thresholds_from, evaluation.threshold_samples) == ("training data", 11)
    assert evaluation.not_computed["train images"].startswith("1 damaged images left out: ")
    # More than the allowance: no thresholds at all rather than those of the test images.
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no image")
    evaluation = evaluate(make_network(), train, test, repeats=1)
    assert evaluation.one_class is None
    assert "max_damaged" in evaluation.not_computed["one_class"]


@pytest.mark.parametrize("storage", ["files", "memory"])
def test_a_class_whose_images_are_all_damaged_is_refused(tmp_path: Path, storage: str) -> None:
    """gigagan-pytorch#27: a network with a class that it never saw, exit status 0."""
    root = good_folder(tmp_path / "data")
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    (root / "train" / "bee" / "only.png").write_bytes(b"no image")

    def train() -> None:
        splits = load_dataset("folder", root, storage=storage)
        list(TrainImages(splits.train, TrainTransform(Augmentation(), COLOUR), 4, seed=0))

    with pytest.raises(ValueError, match=r"only\.png: expected a readable image of every class"):
        train()


def test_predict_classifies_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promptvision#10: one damaged file stopped a folder; now it is named, and the status is 1."""
    root = good_folder(tmp_path / "data")
    grey = Preprocessing(8, 1, (0.5,), (0.25,))
    save_model(tmp_path / "m.safetensors", make_network(), preprocessing=grey)
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(root / "test")]
    assert main.main(arguments) == 0
    (root / "test" / "bee" / "a.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out.count(".png") == 2 * GOOD
    assert "bee/a.png: not a readable image" in said.err


# Names of files and folders, and what is there: a picture, other bytes, nothing, a folder.
NAME = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6
)
ENTRIES = st.lists(
    st.tuples(
        st.lists(NAME | st.sampled_from(["2019", ".git", "__MACOSX"]), max_size=2),
        NAME | st.sampled_from(["a", ".hidden", os.fsdecode(b"\xff")]),
        st.sampled_from([".png", ".PNG", ".jpg", ".txt", "", ".mpg"]),
        st.sampled_from(["picture"] * 6 + ["damaged", "empty", "dead link", "link"]),
    ),
    max_size=5,
)


def fill(folder: Path, entries: list[tuple[list[str], str, str, str]]) -> None:
    folder.mkdir(parents=True)
    for inside, stem, ending, content in entries:
        path = folder.joinpath(*inside, stem + ending)
        if path.name in (".", "..") or {".", ".."} & set(inside) or os.path.lexists(path):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            continue
        if content == "picture":
            picture(path)
        elif content == "link":
            path.symlink_to(folder.parents[1] / "good.png")
        elif content == "dead link":
            path.symlink_to("nowhere")
        else:
            path.write_bytes(b"" if content == "empty" else b"no image")


def check_tree(entries: list[list[tuple[list[str], str, str, str]]]) -> None:
    with tempfile.TemporaryDirectory(dir=TREES) as name:
        root = Path(name)
        picture(root / "good.png")
        for index, inside in enumerate(entries):
            fill(root / "data" / f"class {index}", inside)
        data, classes = root / "data", tuple(f"class {i}" for i in range(len(entries)))
        read: list[list[str]] = []
        refused: list[str] = []
        for command in ("train", "eval", "predict"):
            try:
                if command == "train":
                    images = find_image_folder(data, holdout=0.5).train
                elif command == "eval":
                    images = find_image_folder(data, classes).test
                else:
                    images = FileImages.of_no_class([data])
                damaged = DamagedImages(images, 1.0)
                loader = EvalImages(images, COLOUR, 4, damaged=damaged)
                indices = [i for b in loader.batches() for i in b.indices.tolist()]
            except ValueError as error:
                refused.append(str(error))
                # A class without an image is no business of the other commands.
                if command == "train" and "every class" in str(error):
                    refused.pop()
                if "found none in it" in str(error) or "at least one to evaluate" in str(error):
                    refused.pop()
                continue
            for index in indices:
                parts = Path(images.name(index)).relative_to(data).parts
                assert not any(part.startswith(".") or part == "__MACOSX" for part in parts)
                if command != "predict":
                    assert parts[0] == classes[int(images.targets[index])]
            read.append([images.name(index) for index in indices])
        assert not (read and refused), (read, refused)
        assert all(names == read[0] for names in read)


@given(st.lists(ENTRIES, min_size=2, max_size=3))
@settings(max_examples=40, deadline=None)
def test_random_trees_are_read_alike(entries: list[list[tuple[list[str], str, str, str]]]) -> None:
    """vision#4925, timm#334: the same classes and images by every command, or a sentence by all."""
    check_tree(entries)


@pytest.mark.long
@given(st.lists(ENTRIES, min_size=2, max_size=3))
@settings(max_examples=2000, deadline=None)
def test_many_random_trees_are_read_alike(
    entries: list[list[tuple[list[str], str, str, str]]],
) -> None:
    """vision#4925, timm#334: as above, two thousand of them."""
    check_tree(entries)


def test_paths_take_as_much_memory_as_their_letters(tmp_path: Path) -> None:
    """pytorch#13246, autoware-ml#78: a worker copied every path as it counted its references."""
    for index in range(50):
        picture(tmp_path / "c" / f"{index:03d}.png")
    images = FileImages.of_classes(tmp_path, ["c"], every_class=True)
    held = [len(images.files.names), images.files.ends.nbytes, images.files.sizes.nbytes]
    assert held == [50 * len("c/000.png"), 8 * 51, 8 * 50]
    assert not any(isinstance(value, (list, tuple)) for value in vars(images.files).values())
    assert images.subset([7, 3]).name(1) == str(tmp_path / "c" / "003.png")
    assert torch.equal(images.targets, torch.zeros(50, dtype=torch.int64))


def test_storage_auto_looks_at_all_classes_and_both_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small first image stood for all, and test images did not count."""
    root = good_folder(tmp_path / "data")
    for split, size in (("train", 100), ("test", 60)):
        for index in range(GOOD):
            Image.new("RGB", (size, size)).save(root / split / "bee" / f"m{index}.png")
    needed = 3 * GOOD * (64 + 100**2 + 64 + 60**2)
    for limit, decoded in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("coded_resnext.data.datasets.MEMORY_BYTES", limit)
        assert isinstance(load_dataset("folder", root).train, FileImages) != decoded
