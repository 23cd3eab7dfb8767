"""Folders of images: order, pixels, and every way in which a folder can be wrong."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from coded_resnext.data.datasets import find_image_folder
from coded_resnext.data.image_folder import find_splits
from coded_resnext.data.loaders import EvalImages
from coded_resnext.data.preprocessing import Preprocessing

GREY = Preprocessing(4, 1, (0.5,), (0.25,))
COLOUR = Preprocessing(4, 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Not in alphabetical order: targets follow the model.
CLASSES = ("dog", "ant", "cat")


def image_folder(root, class_names, preprocessing, batch_size=64):
    return EvalImages(find_image_folder(root, class_names).test, preprocessing, batch_size)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Two dogs, one ant, two cats, and files that are no images of a class."""
    for path, value in (
        ("dog/b.png", 20),
        ("dog/a.png", 10),
        ("ant/1.png", 30),
        ("cat/x.PNG", 40),
        ("cat/y.bmp", 50),
    ):
        write(tmp_path / "data" / path, value)
    (tmp_path / "data" / "README.txt").write_text("not a class")
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / "dog" / ".DS_Store").write_text("not an image")
    return tmp_path / "data"


def test_order_targets_and_pixels(root):
    state = torch.random.get_rng_state()
    loader = image_folder(root, CLASSES, GREY, batch_size=2)
    assert len(loader) == 3
    for _ in range(2):
        found = list(loader)
        images = torch.cat([images for images, _ in found])
        targets = torch.cat([targets for _, targets in found])
        assert targets.tolist() == [0, 0, 1, 2, 2]
        values = torch.tensor([10, 20, 30, 40, 50]) / 255
        expected = ((values - 0.5) / 0.25)[:, None, None, None].expand(5, 1, 4, 4)
        assert torch.allclose(images, expected, atol=1e-6)
    # Nothing random is used up, so that an evaluation does not disturb a training.
    assert torch.equal(torch.random.get_rng_state(), state)


def test_images_of_many_kinds_become_alike(root):
    Image.new("RGBA", (9, 5), (255, 0, 0, 128)).save(root / "ant" / "alpha.png")
    Image.new("P", (5, 9)).save(root / "ant" / "palette.gif")
    Image.new("1", (7, 7), 1).save(root / "ant" / "two.tiff")
    [(images, _)] = image_folder(root, CLASSES, COLOUR, batch_size=9)
    assert images.shape == (8, 3, 4, 4)
    # alpha.png is the second of the ants (after 1.png).
    assert images[3].mean((1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.01)


def test_folders_that_are_no_classes_are_refused(root):
    with pytest.raises(ValueError, match=r"2 classes of the network, got also cat"):
        image_folder(root, CLASSES[:2], GREY)


def test_a_class_may_have_no_test_image_but_must_have_a_training_image(root):
    assert len(find_image_folder(root, (*CLASSES, "emu")).test) == 5
    (root / "emu" / "empty").mkdir(parents=True)
    assert len(find_image_folder(root, (*CLASSES, "emu")).test) == 5
    (root / "emu" / "note.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"images of every class, got none of emu, 1 other files"):
        find_image_folder(root, holdout=0.2)


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_unreadable_images_are_left_out_and_named(root, damage, capsys):
    whole = (root / "dog" / "b.png").read_bytes()
    content = {"text": b"hello", "truncated": whole[: len(whole) - 25]}[damage]
    (root / "cat" / "broken.png").write_bytes(content)
    loader = image_folder(root, CLASSES, GREY, batch_size=2)
    for _ in range(2):
        assert torch.cat([targets for _, targets in loader]).tolist() == [0, 0, 1, 2, 2]
        assert [len(targets) for _, targets in loader] == [2, 2, 1]
    assert list(loader.damaged.reasons) == [str(root / "cat" / "broken.png")]
    assert capsys.readouterr().err.count("left out: ") == 1
    (root / "dog" / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"max_damaged: expected at most 1 .*broken\.png"):
        list(image_folder(root, CLASSES, GREY))


def test_bad_arguments(root):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        image_folder(root, CLASSES, GREY, batch_size=0)
    with pytest.raises(NotADirectoryError, match=r"README\.txt: expected a folder"):
        image_folder(root / "README.txt", CLASSES, GREY)


def test_without_pillow(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="images need Pillow; pip install pillow"):
        image_folder(root, CLASSES, GREY)


@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        (["dog", "ant"], ["ant", "dog"], (None, "")),
        (["train", "test"], ["ant", "dog"], ("train", "test")),
        (["train", "val"], ["ant", "dog"], ("train", "val")),
        (["train", "val", "test"], ["ant", "dog"], ("train", "test")),
        (["test"], ["ant", "dog"], (None, "test")),
        # Wrong folders are left for find_image_folder to name.
        (["dog", "emu"], ["ant", "dog"], (None, "")),
        # A network that tells trains from tests.
        (["train", "test"], ["test", "train"], (None, "")),
    ],
)
def test_splits(tmp_path, folders, classes, expected):
    for folder in folders:
        (tmp_path / folder).mkdir()
    train, test = find_splits(tmp_path, classes)
    assert train == (None if expected[0] is None else tmp_path / expected[0])
    assert test == tmp_path / expected[1]


def test_training_images_alone_are_no_test(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="expected a folder test or val beside train"):
        find_splits(tmp_path, ["ant", "dog"])


def test_a_file_that_all_may_read_is_asked_about_once(root, monkeypatch):
    """torchvision#557, #617: four system calls a file, on a network file system."""
    asked, access = [], os.access
    monkeypatch.setattr(os, "access", lambda *args: (asked.append(args[0]), access(*args))[1])
    (root / "dog" / "a.png").chmod(0o600)
    image_folder(root, CLASSES, GREY)
    assert asked == [root / "dog" / "a.png"]
