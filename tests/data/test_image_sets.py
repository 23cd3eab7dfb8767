"""Sets of images: in files and in memory, parts of them, and damaged files."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coded_resnext.data import datasets
from coded_resnext.data.datasets import load_dataset
from coded_resnext.data.image_folder import find_images
from coded_resnext.data.image_sets import (
    DamagedImages,
    FileImages,
    ImageSplits,
    MemoryImages,
    _kept,
    into_memory,
)

TARGETS = torch.tensor([0] * 40 + [1] * 10 + [2])


def memory(targets: torch.Tensor = TARGETS) -> MemoryImages:
    """Every image says its number."""
    pixels = np.arange(len(targets), dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(pixels, (len(targets), 2, 2, 3)).copy()
    return MemoryImages(images, targets, [f"image {i}" for i in range(len(targets))])


def numbers(images: MemoryImages) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """Six images, the third of which is no image."""
    for index in range(6):
        Image.new("RGB", (3, 2), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    return FileImages(find_images([tmp_path]), torch.arange(6))


def test_files_and_memory_hold_the_same(files: FileImages) -> None:
    chosen = files.subset([5, 0, 3])
    decoded = into_memory(chosen, DamagedImages(chosen, 0))
    assert decoded.pixels.dtype == torch.uint8
    assert decoded.pixels.shape == (3, 3, 2, 3)
    assert numbers(decoded) == [5, 0, 3] == decoded.targets.tolist()
    for index in range(3):
        assert decoded.name(index) == chosen.name(index)
        assert np.array_equal(np.asarray(decoded.image(index)), np.asarray(chosen.image(index)))
    assert numbers(decoded.subset([2, 0])) == [3, 5]


def test_images_of_different_sizes_stay_apart(files: FileImages) -> None:
    Image.new("RGB", (7, 7)).save(files.files[1])
    decoded = into_memory(files.subset([0, 1]), DamagedImages(files, 0))
    assert [decoded.image(index).size for index in range(2)] == [(3, 2), (7, 7)]
    assert decoded.subset([1]).image(0).size == (7, 7)
    with pytest.raises(ValueError, match="expected one size for all, got 2 sizes"):
        _ = decoded.pixels


def test_damaged_images_are_left_out_up_to_a_limit(
    files: FileImages, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = DamagedImages(files, 0.1)  # rounded up: one of six
    decoded = into_memory(files, damaged)
    assert numbers(decoded) == [0, 1, 3, 4, 5] == decoded.targets.tolist()
    assert decoded.name(2) == files.name(3)
    assert list(damaged.reasons) == [files.name(2)]
    assert "2.png: not a readable image" in capsys.readouterr().err
    files.files[4].write_bytes(b"")
    with pytest.raises(ValueError, match=r"at most 1 damaged .*2\.png.*4\.png"):
        into_memory(files, DamagedImages(files, 0.1))
    with pytest.raises(ValueError, match=r"at most 0 damaged"):
        into_memory(files, DamagedImages(files, 0.0))


def test_a_damaged_image_is_counted_once() -> None:
    damaged = DamagedImages(memory(), 0.01)
    damaged.add(0, "image 0: broken")
    damaged.add(0, "image 0: broken")
    with pytest.raises(ValueError, match="at most 1 damaged images, got more: image 0, image 1;"):
        damaged.add(1, "image 1: broken")


def test_the_last_image_of_a_class_is_not_left_out() -> None:
    """gigagan-pytorch#27: a network would have a class that it never saw."""
    DamagedImages(memory(), 0.1).add(50, "image 50: broken")
    with pytest.raises(ValueError, match="image 50: expected a readable image of every class"):
        DamagedImages(memory(), 0.1, every_class=True).add(50, "image 50: broken")


def test_slices_are_stratified_nested_and_the_same_every_time() -> None:
    splits = ImageSplits("ramp", ("a", "b", "c"), memory(), memory())
    parts = {n: splits.slice(train_images=n) for n in (10, 26, 51)}
    chosen = {n: numbers(part.train) for n, part in parts.items()}
    assert chosen[51] == list(range(51))
    # The share of each class, at least one: 8 of 40, 2 of 10, and the only one of the third.
    assert torch.bincount(parts[10].train.targets).tolist() == [8, 2, 1]
    assert set(chosen[10]) < set(chosen[26])
    assert chosen[10] == numbers(splits.slice(train_images=10).train)
    assert chosen[10] != [*range(8), 40, 41, 50]
    assert numbers(parts[10].test) == list(range(51))
    assert len(splits.slice(test_images=10).test) == 11


def test_what_is_held_out_is_not_trained_on() -> None:
    splits = ImageSplits("ramp", ("a", "b", "c"), memory(), memory(torch.zeros(3, dtype=int)))
    part = splits.slice(holdout=0.25)
    train, held = set(numbers(part.train)), set(numbers(part.test))
    assert not train & held
    assert train | held == set(range(51))
    # One image of a class is trained on, not held out.
    assert torch.bincount(part.test.targets, minlength=3).tolist() == [10, 3, 0]
    small = splits.slice(holdout=0.25, train_images=50)
    assert set(numbers(small.train)) <= train
    assert set(numbers(small.test)) == held
    assert str(splits.slice(holdout=0.25)) == (
        "ramp, 3 classes: 38 images (1 to 30 of each) to train on, "
        "13 images (0 to 10 of each) to test on"
    )


def test_refusals() -> None:
    splits = ImageSplits("ramp", ("a", "b", "c"), memory(), memory())
    with pytest.raises(ValueError, match="holdout: expected 0 <= holdout < 1, got 1"):
        splits.slice(holdout=1)
    for wrong in (0, 52):
        with pytest.raises(ValueError, match=f"train_images: expected 1 to 51 .*got {wrong}"):
            splits.slice(train_images=wrong)
    with pytest.raises(ValueError, match="test_images: expected 1 to 51 images, got 52"):
        splits.slice(test_images=52)
    with pytest.raises(ValueError, match="images: expected as many as targets and names"):
        MemoryImages(np.zeros((2, 4, 4, 3), np.uint8), torch.zeros(3), ["a", "b"])
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] each, got float64 \[4, 4, 3\]"):
        MemoryImages(np.zeros((1, 4, 4, 3)), torch.zeros(1), ["a"])


def test_drawing_images_takes_time_by_their_number_and_not_by_that_of_classes() -> None:
    """10,000 classes of 200,000 images took 11 s, also where nothing was cut."""
    targets = torch.arange(200_000) % 10_000
    begun = time.process_time()
    assert _kept(targets, "train_images", None, 0.0) == list(range(200_000))
    part = _kept(targets, "train_images", 100_000, 0.0)
    assert time.process_time() - begun < 4
    assert (targets[torch.tensor(part)].bincount() == 10).all()
    assert part == sorted(set(part))


def test_a_large_image_among_small_ones_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a set is decoded into memory is found by the headers of some of its images."""
    from PIL import Image

    for split, side in (("train/a", 8), ("train/b", 400), ("test/a", 8)):
        (tmp_path / split).mkdir(parents=True)
        Image.new("RGB", (side, side)).save(tmp_path / split / "0.png")
    monkeypatch.setattr(datasets, "MEMORY_BYTES", 100_000)
    monkeypatch.setattr(datasets, "_decoded_bytes", lambda _: 0.0)
    assert isinstance(load_dataset("folder", tmp_path).train, FileImages)
    assert isinstance(load_dataset("folder", tmp_path, storage="memory").train, MemoryImages)
