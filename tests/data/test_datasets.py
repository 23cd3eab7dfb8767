"""Data sets by name: both forms of CIFAR on the disk, folders of images, the synthetic one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.image_data import REAL_DATA, needs_cifar10, write_images

from coded_resnext.data import datasets
from coded_resnext.data.datasets import load_dataset
from coded_resnext.data.image_sets import FileImages, MemoryImages

COUNTS = {"dog": 5, "ant": 1, "cat": 3}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Uneven classes; no image to test `ant`."""
    write_images(tmp_path / "pets" / "train", COUNTS)
    write_images(tmp_path / "pets" / "val", {"dog": 2, "cat": 2}, seed=1)
    return tmp_path / "pets"


def test_any_folder(root: Path) -> None:
    splits = load_dataset("folder", root)
    assert splits.name == "pets"
    assert splits.class_names == ("ant", "cat", "dog")
    assert splits.train.targets.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert splits.test.targets.tolist() == [1, 1, 2, 2]
    assert splits.train.name(1) == str(root / "train" / "cat" / "00000.png")
    assert isinstance(splits.train, MemoryImages)
    unread = load_dataset("folder", root, storage="files")
    assert isinstance(unread.train, FileImages)
    for index in range(9):
        assert np.array_equal(splits.train.image(index), unread.train.image(index))


def test_large_sets_stay_in_their_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 13 * 12 * 12 * 3
    monkeypatch.setattr(datasets, "MEMORY_BYTES", size)
    assert isinstance(load_dataset("folder", root).train, MemoryImages)
    monkeypatch.setattr(datasets, "MEMORY_BYTES", size - 1)
    assert isinstance(load_dataset("folder", root).train, FileImages)
    assert isinstance(load_dataset("folder", root, storage="memory").train, MemoryImages)
    # The part that is asked for counts, and is all that is read.
    (root / "train" / "dog" / "00003.png").write_bytes(b"no image")
    assert isinstance(load_dataset("folder", root, train_images=3).train, MemoryImages)


def test_a_class_without_training_images_is_refused(root: Path) -> None:
    write_images(root / "val", {"emu": 1})
    with pytest.raises(ValueError, match=r"val: .* the 3 classes in .*train, got also emu"):
        load_dataset("folder", root)
    (root / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"train: expected images of every class, got none of emu"):
        load_dataset("folder", root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_files_are_found_at_the_start(root: Path, split: str) -> None:
    (root / split / "cat" / "blank.png").touch()
    with pytest.raises(ValueError, match=rf"{split}: .*got 1 empty files: cat.blank\.png; remove"):
        load_dataset("folder", root, storage="files")


def test_damage_is_left_out_of_both_sets_up_to_a_limit(root: Path) -> None:
    (root / "train" / "dog" / "00003.png").write_bytes(b"no image")
    splits = load_dataset("folder", root, max_damaged=0.1)
    assert len(splits.train) == 8
    assert list(splits.damaged) == [str(root / "train" / "dog" / "00003.png")]
    with pytest.raises(ValueError, match="max_damaged: expected at most 0"):
        load_dataset("folder", root, max_damaged=0)
    (root / "val" / "dog" / "00000.png").write_bytes(b"no image")
    assert len(load_dataset("folder", root, max_damaged=0.1).test) == 3
    (root / "val" / "dog" / "00001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"max_damaged: expected at most 1 .*00000.*00001"):
        load_dataset("folder", root, max_damaged=0.1)


def test_missing_data_are_named_with_the_remedy(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz.*--data-dir.*--download"):
        load_dataset("cifar10", root)
    with pytest.raises(ValueError, match=r"train: expected folders train and test .*--holdout"):
        load_dataset("folder", root / "train")
    with pytest.raises(NotADirectoryError, match="nowhere: expected a folder of images"):
        load_dataset("folder", root / "nowhere")
    (root / "solo" / "test").mkdir(parents=True)
    write_images(root / "solo" / "train", {"ant": 1})
    with pytest.raises(ValueError, match="expected folders of two classes or more, got 1"):
        load_dataset("folder", root / "solo")
    with pytest.raises(ValueError, match=r"dataset: expected one of cifar10.*got 'mnist'"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="storage: expected one of auto, memory, files; got disk"):
        load_dataset("folder", root, storage="disk")


def cifar_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": generator.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
        "classes": np.array(["ant", "cat", "dog"]),
    }


def test_cifar_as_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    monkeypatch.setenv("CODED_RESNEXT_DATA", str(tmp_path))
    splits = load_dataset("cifar10")
    assert splits.class_names == ("ant", "cat", "dog")
    for part, split in ((splits.train, "train"), (splits.test, "test")):
        assert isinstance(part, MemoryImages)
        assert np.array_equal(part.pixels.permute(0, 2, 3, 1).numpy(), arrays[f"x_{split}"])
        assert part.targets.tolist() == arrays[f"y_{split}"].tolist()
        assert part.name(3).endswith(f"cifar10.npz: {split} image 3")
    content = (tmp_path / "cifar10.npz").read_bytes()
    (tmp_path / "cifar10.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cifar10\.npz: damaged, or not an archive of images"):
        load_dataset("cifar10")


def test_cifar_as_torchvision_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched here: torchvision's class is replaced by one that has the arrays."""
    arrays, asked = cifar_arrays(), []

    def torchvision_class(root: str, *, train: bool, download: bool) -> SimpleNamespace:
        asked.append((root, download))
        split = "train" if train else "test"
        return SimpleNamespace(
            data=arrays[f"x_{split}"],
            targets=arrays[f"y_{split}"].tolist(),
            classes=arrays["classes"].tolist(),
        )

    monkeypatch.setattr("torchvision.datasets.CIFAR100", torchvision_class)
    splits = load_dataset("cifar100", tmp_path, download=True, train_images=6)
    assert asked == [(str(tmp_path), True)] * 2
    assert splits.train.targets.tolist().count(2) == 2
    assert splits.test.name(5) == "cifar100 test image 5"
    monkeypatch.undo()
    # Its folder is there, and its files are not what they should be.
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(ValueError, match="cifar-100-python: Dataset not found or corrupted"):
        load_dataset("cifar100", tmp_path)


@needs_cifar10
def test_a_slice_of_the_real_cifar10() -> None:
    splits = load_dataset("cifar10", REAL_DATA, train_images=100, test_images=50)
    assert splits.class_names[0] == "airplane"
    assert splits.class_names[-1] == "truck"
    assert isinstance(splits.train, MemoryImages)
    assert splits.train.pixels.shape == (100, 3, 32, 32)
    assert torch.bincount(splits.train.targets).tolist() == [10] * 10
    assert torch.bincount(splits.test.targets).tolist() == [5] * 10
    # Photographs, not noise: neighbouring pixels are alike.
    pixels = splits.train.pixels.float()
    assert float((pixels[..., 1:] - pixels[..., :-1]).abs().mean()) < 0.3 * float(pixels.std())


def test_synthetic_images_show_their_class() -> None:
    splits = load_dataset("synthetic")
    again = load_dataset("synthetic")
    assert isinstance(splits.train, MemoryImages)
    assert isinstance(splits.test, MemoryImages)
    assert isinstance(again.test, MemoryImages)
    assert torch.equal(splits.test.pixels, again.test.pixels)
    means = torch.stack(
        [splits.train.pixels[splits.train.targets == k].float().mean(0) for k in range(10)]
    )
    nearest = torch.cdist(splits.test.pixels.float().flatten(1), means.flatten(1)).argmin(1)
    assert float((nearest == splits.test.targets).double().mean()) > 0.9
