"""Further situations of public reports of other projects, tried on images and their loaders."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.datasets import find_image_folder, make_synthetic
from coded_resnext.data.image_folder import open_image
from coded_resnext.data.loaders import EvalImages, TrainImages
from coded_resnext.data.preprocessing import Preprocessing

COLOUR = Preprocessing(8, 3, (0.5,) * 3, (0.25,) * 3)
RED_AND_BLUE = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))


def write(path: Path, image: Image.Image = RED_AND_BLUE, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    return path


def test_classes_go_by_name_where_one_is_missing(tmp_path: Path) -> None:
    """ultralytics#13936: without the class 180, images of 90 were taken for 180."""
    names = ("0", "180", "270", "90")
    for name in names:
        write(tmp_path / "train" / name / "a.png")
        if name != "180":
            write(tmp_path / "test" / name / "a.png")
    for splits in (find_image_folder(tmp_path), find_image_folder(tmp_path / "test", names)):
        assert splits.class_names == names
        assert splits.test.targets.tolist() == [0, 2, 3]


def test_a_network_keeps_the_order_of_its_classes(tmp_path: Path) -> None:
    """vision#714, ImageNetV2#10: folders 1, 2, 10 are in another order as texts than as numbers."""
    for name in ("1", "2", "10"):
        write(tmp_path / name / "a.png")
    splits = find_image_folder(tmp_path, ("1", "2", "10"))
    named = [Path(splits.test.name(index)).parent.name for index in range(3)]
    assert named == ["1", "2", "10"]
    assert splits.test.targets.tolist() == [0, 1, 2]


def test_the_order_is_not_that_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vision#192, finn-examples#14: what a listing yields first differs between machines."""
    for name in ("b/y/2.png", "b/x.png", "b/y/1.png", "a/z.png", "b/Y.png"):
        write(tmp_path / name)
    expected = [find_image_folder(tmp_path, ("a", "b")).test.name(index) for index in range(5)]
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder: Any) -> None:
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("coded_resnext.data.image_folder.os.scandir", Reversed)
    found = find_image_folder(tmp_path, ("a", "b")).test
    assert [found.name(index) for index in range(5)] == expected


@pytest.mark.parametrize(("images", "ranks", "batch_size"), [(10, 2, 3), (7, 3, 4), (2, 3, 1)])
def test_processes_evaluate_each_image_once(images: int, ranks: int, batch_size: int) -> None:
    """pytorch#25162, vision#4559: samples were repeated until the processes divided them."""
    splits = make_synthetic(train_images=10, test_images=images)
    preprocessing = Preprocessing(32, 3, (0.5,) * 3, (0.25,) * 3)
    seen: list[int] = []
    for rank in range(ranks):
        loader = EvalImages(splits.test, preprocessing, batch_size, rank=rank, world_size=ranks)
        seen += (index for batch in loader.batches() for index in batch.indices.tolist())
    assert sorted(seen) == list(range(images))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_two_images_and_no_two_epochs_have_the_same_draws(workers: int) -> None:
    """pytorch#5059, #41329, CenterNet#233, lightning#20412: workers drew alike, in every epoch."""
    synthetic = make_synthetic(classes=1, train_images=8).train
    same = synthetic.subset([0] * 8)
    preprocessing = Preprocessing(32, 3, (0.5,) * 3, (0.25,) * 3)
    transform = TrainTransform(Augmentation(), preprocessing)
    loader = TrainImages(same, transform, 4, seed=0, workers=workers)
    seen = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        seen += [image for batch in loader for image in batch.images]
    distinct = {tuple(image.flatten()[::97].tolist()) for image in seen}
    assert len(seen) == len(distinct) == 16


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path, orientation: int) -> None:
    """imageio#1159, Pillow#4215: cameras and editors write such numbers."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(path, 3)), np.asarray(RED_AND_BLUE))


@pytest.mark.parametrize("transparency", [0, b"\x80\xff", b"\x00"])
def test_palettes_with_transparent_entries_keep_their_colours(
    tmp_path: Path, transparency: Any
) -> None:
    """Pillow#510, pillow_heif#21, ueberzug#85: a crash, another colour, a warning for each."""
    palette = RED_AND_BLUE.quantize(2)
    path = write(tmp_path / "a.png", palette, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(path, 3)
    assert np.array_equal(np.asarray(opened), np.asarray(RED_AND_BLUE))


@pytest.mark.parametrize("mode", ["RGBX", "RGBA", "LAB", "YCbCr", "HSV", "LA", "PA", "1"])
def test_every_mode_becomes_colours(mode: str) -> None:
    """demozoo#549, Pillow#2702: padded colours and other modes that a TIFF may have."""
    grey = Image.new("L", (9, 5), 255)
    image = (grey if mode in ("LA", "1") else grey.convert("RGB")).convert(
        "RGB" if mode == "LAB" else "LA" if mode == "PA" else mode
    )
    if mode == "PA":
        image = image.convert("PA")
    elif mode == "LAB":
        image = Image.merge("LAB", [grey, Image.new("L", (9, 5), 128), Image.new("L", (9, 5), 128)])
    pixels = COLOUR(image)
    assert pixels.shape == (3, 8, 8)
    assert float((pixels * 0.25 + 0.5).min()) > 0.97


def test_a_file_of_a_camera_maker_is_left_out_or_refused(tmp_path: Path) -> None:
    """Pillow#8554: a raw file is a TIFF to a reader that looks at its first bytes."""
    buffer = BytesIO()
    RED_AND_BLUE.save(buffer, "TIFF")
    for name in ("ant", "bee"):
        write(tmp_path / name / "a.png")
        (tmp_path / name / "b.CR2").write_bytes(buffer.getvalue())
    splits = find_image_folder(tmp_path, ("ant", "bee"))
    assert len(splits.test) == 2
    assert "2 other files left out" in str(splits)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(0, 24),
    st.sampled_from([1, 3]),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_preprocessing_gives_the_range_that_it_says(
    width: int, height: int, size: int, more: int, channels: int, mean: float, std: float
) -> None:
    """transformers#25688: whatever the picture, black and white become the ends of one range."""
    preprocessing = Preprocessing(
        size, channels, (mean,) * channels, (std,) * channels, resize=size + more
    )
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[0, 0], noise[-1, -1] = 0, 255
    pixels = preprocessing(Image.fromarray(noise))
    assert pixels.shape == (channels, size, size)
    assert bool(pixels.isfinite().all())
    low, high = (0 - mean) / std, (1 - mean) / std
    assert low - 1e-4 <= float(pixels.min()) <= float(pixels.max()) <= high + 1e-4
    for value, end in ((0, low), (255, high)):
        plain = preprocessing(Image.new("RGB", (width, height), (value,) * 3))
        torch.testing.assert_close(plain, torch.full_like(plain, end), rtol=1e-5, atol=1e-4)
