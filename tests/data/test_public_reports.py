"""Situations of public bug reports of other projects: images and folders as people have them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torture.images import mutate_images

from coded_resnext.data.augment import (
    Augmentation,
    TrainTransform,
    generators_kept,
    seed_generators,
)
from coded_resnext.data.datasets import find_image_folder, load_dataset
from coded_resnext.data.image_folder import FORMATS, class_folders, find_images, open_image
from coded_resnext.data.preprocessing import Preprocessing, resize_and_cut


def test_an_odd_exif_entry_does_not_cost_the_picture(tmp_path: Path) -> None:
    """Pillow#8605, datasets#6739, detectron2#361: the orientation alone is read."""
    entries = struct.pack("<HHLHH", 274, 3, 1, 6, 0)
    entries += struct.pack("<HHL", 282, 2, 3) + b"72\0\0"
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + struct.pack("<L", 0)
    Image.new("RGB", (24, 20)).save(tmp_path / "odd.jpg", exif=exif)
    assert open_image(tmp_path / "odd.jpg", 3).size == (20, 24)


@pytest.mark.parametrize("header", [b"MM\0\0", b"]M\0*", b"II*\0"])
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path, header: bytes) -> None:
    """Pillow#8605: opened well, such a picture failed when its pixels were resized.

    Two JPEGs in twenty thousand mutated images, with Pillow's own SyntaxError.
    """
    exif = b"Exif\0\0" + header + b"\0\0\0\x08\0\1"
    Image.new("RGB", (24, 20), (9, 9, 9)).save(tmp_path / "odd.jpg", exif=exif)
    preprocessing = Preprocessing(8, 3, (0.0,) * 3, (1.0,) * 3)
    pixels = preprocessing(open_image(tmp_path / "odd.jpg", 3))
    torch.testing.assert_close(pixels, torch.full_like(pixels, 9 / 255), rtol=0, atol=2 / 255)


def test_every_failure_is_not_a_readable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """detectron2#361: what Pillow raises is no closed list."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise AttributeError("of some plugin")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image: of some plugin"):
        open_image(tmp_path / "a.png", 1)


def test_postscript_starts_no_program(tmp_path: Path) -> None:
    """Pillow#7391: whatever its name, such a file is no image."""
    path = tmp_path / "cat.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="cannot identify"):
        open_image(path, 3)


@pytest.mark.parametrize("size", [(65000, 1), (1, 65000)])
def test_work_follows_the_size_asked_for(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """image-rs#3083: a strip of 270 bytes asked for gigabytes."""
    asked = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        asked.append(size)
        return resize(self, (8, 8))

    monkeypatch.setattr(Image.Image, "resize", noted)
    resize_and_cut(Image.new("RGB", size), 224)
    assert max(asked[0]) <= 16 * 224


def test_the_centre_of_a_strip_is_the_same(tmp_path: Path) -> None:
    """image-rs#3083: what is cut away is never shown."""
    generator = np.random.default_rng(0)
    strip = Image.fromarray(generator.integers(0, 256, (8, 400, 3), dtype=np.uint8))
    whole = strip.resize((800, 16)).crop((392, 0, 408, 16))
    cut = np.asarray(resize_and_cut(strip, 16)).astype(int)
    assert np.abs(cut - np.asarray(whole)).max() <= 1


def test_mean_and_deviation_are_of_intensities_in_0_to_1() -> None:
    """transformers#25688, keras-preprocessing#100: numbers of 0..255 made all images alike."""
    with pytest.raises(ValueError, match=r"^mean: expected"):
        Preprocessing(32, 3, (123.675, 116.28, 103.53), (0.2,) * 3)
    with pytest.raises(ValueError, match=r"^std: expected"):
        Preprocessing(32, 3, (0.5,) * 3, (58.395, 57.12, 57.375))


def test_hidden_folders_and_other_files_are_left_out(tmp_path: Path) -> None:
    """vision#2831, tensorflow#46595, Promptvision#10, palimpzest#228: checkpoints of notebooks, and
    what Pillow names only.
    """
    image = Image.new("RGB", (4, 4))
    image.save(tmp_path / "a.png")
    hidden = tmp_path / ".ipynb_checkpoints"
    hidden.mkdir()
    image.save(hidden / "a-checkpoint.png")
    for name in ("scores.h5", "clip.mpg", "model.fit", "map.wmf", "t.grib", "page.eps"):
        (tmp_path / name).write_text("x")
    files = find_images([tmp_path])
    assert (len(files), files[0], files.others) == (1, tmp_path / "a.png", 6)


def test_a_class_that_is_a_dead_link_is_refused(tmp_path: Path) -> None:
    """timm#334, Hierarchical-Localization#283: it vanished without a word."""
    (tmp_path / "ant").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".cache").mkdir()
    assert list(class_folders(tmp_path)) == ["ant"]
    (tmp_path / "cat").symlink_to("/gone/cat")
    with pytest.raises(ValueError, match="cat: expected a folder, got a link to nothing"):
        class_folders(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (7, 1)])
def test_a_part_of_a_tiny_picture_is_a_pixel_at_least(size: tuple[int, int]) -> None:
    """mlverse/torchvision#44, discolight#23: a quarter of the crops of one pixel were black."""
    preprocessing = Preprocessing(8, 3, (0.0,) * 3, (1.0,) * 3)
    colour = (200, 100, 50)
    images = [Image.new("RGB", size, colour)] * 100
    pixels = TrainTransform(Augmentation(), preprocessing)(images, range(100))
    expected = torch.tensor(colour)[:, None, None].expand(100, 3, 8, 8) / 255
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_a_part_of_any_other_picture_is_as_timm_draws_it() -> None:
    """mlverse/torchvision#44: what tiny pictures needed changes no draw of others."""
    from timm.data.transforms import RandomResizedCropAndInterpolation

    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    part = RandomResizedCropAndInterpolation(8, interpolation="random")
    transform = TrainTransform(Augmentation(hflip=0), Preprocessing(8, 3, (0.0,) * 3, (1.0,) * 3))
    for seed in range(20):
        with generators_kept():
            seed_generators(seed)
            expected = torch.from_numpy(np.array(part(picture))).permute(2, 0, 1) / 255
        torch.testing.assert_close(transform([picture], [seed])[0], expected, rtol=0, atol=1e-6)


METHODS = [
    "fork",
    pytest.param("spawn", marks=pytest.mark.long),
    pytest.param("forkserver", marks=pytest.mark.long),
]
needs_methods = pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
SCRIPT = """
import sys, torch
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.datasets import make_synthetic
from coded_resnext.data.loaders import TrainImages
from coded_resnext.data.on_device import DeviceTrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.training.processes import run_script

PREPROCESSING = Preprocessing(32, 3, (.5,) * 3, (.25,) * 3)
AUGMENTATION = Augmentation(crop_padding=4, aa="rand-m7-n2-mstd0.5")

def on_device(workers):
    images = make_synthetic(train_images=16).train
    loader = DeviceTrainImages(images, AUGMENTATION, PREPROCESSING, 8,
                               device=torch.device("cpu"), seed=0, workers=workers)
    return next(iter(loader)).images

class Failing:
    targets = torch.arange(16) % 2

    def __len__(self):
        return 16

    def image(self, index):
        raise AssertionError("of some library")

def train_on_failing():
    transform = TrainTransform(AUGMENTATION, PREPROCESSING)
    list(TrainImages(Failing(), transform, 4, seed=0, workers=2))

if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[2])
    if sys.argv[1] == "device":
        print(float((on_device(0) - on_device(1)).abs().max()))
    else:
        sys.exit(run_script("train.py", train_on_failing))
"""


def run_main(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of its own, which spawned workers import."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@needs_methods
@pytest.mark.parametrize("method", METHODS)
def test_workers_may_be_started_in_any_way(tmp_path: Path, method: str) -> None:
    """pytorch#51836, torchgeo-bench#273: what a worker gets must be picklable."""
    result = run_main(tmp_path, "device", method)
    assert result.stdout.strip() == "0.0", result.stderr


@needs_methods
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_fails_ends_the_run_with_a_sentence(tmp_path: Path, method: str) -> None:
    """infinibatch#17, pytorch#26072, #39869: the process waited for its other workers for ever."""
    result = run_main(tmp_path, "failing", method)
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert line.endswith("a process that reads images has failed: AssertionError: of some library")


def test_names_that_are_no_utf_8_come_out_escaped(tmp_path: Path) -> None:
    """pyload#4523, gsutil#1625: one such name cost the report, after hours of training."""
    odd = os.fsdecode(b"caf\xe9")
    for split, name in product(("train", "test"), (odd, "bee")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / name / "a.png")
    (tmp_path / "train" / "bee" / f"{odd}.png").write_bytes(b"no image")
    splits = load_dataset("folder", tmp_path, max_damaged=0.5, storage="memory")
    assert splits.class_names == ("bee", "caf\\udce9")
    [(name, reason)] = splits.damaged.items()
    for text in (str(splits), name, reason, splits.train.name(1)):
        assert text.isprintable()
        text.encode()
    # The same folders are the classes of the network that was trained on them.
    assert find_image_folder(tmp_path, splits.class_names).test.targets.tolist() == [0, 1]


def read_mutated(folder: Path, files: int) -> None:
    outcomes = mutate_images(folder, files=files, seed=10**6)
    assert not outcomes.escaped
    assert outcomes.read + outcomes.refused == files
    assert outcomes.slowest < 10
    # All formats but those that only newer versions of Pillow write.
    assert set(FORMATS) - {"AVIF", "QOI", "DDS", "MPO"} <= outcomes.tried.keys()


def test_mutated_images_are_read_or_refused(tmp_path: Path) -> None:
    """detectron2#361, Pillow#8605: `make torture` tries twenty thousand."""
    read_mutated(tmp_path, 90)


@pytest.mark.long
def test_many_mutated_images_are_read_or_refused(tmp_path: Path) -> None:
    """detectron2#361, Pillow#8605: as above."""
    read_mutated(tmp_path, 1800)
