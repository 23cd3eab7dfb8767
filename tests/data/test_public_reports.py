"""Situations of public bug reports of other projects: images and folders as people have them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coded_resnext.data.image_folder import class_folders, find_images, open_image
from coded_resnext.data.preprocessing import Preprocessing, resize_and_cut


def test_an_odd_exif_entry_does_not_cost_the_picture(tmp_path: Path) -> None:
    """Pillow#8605, datasets#6739, detectron2#361: the orientation alone is read."""
    entries = struct.pack("<HHLHH", 274, 3, 1, 6, 0)
    entries += struct.pack("<HHL", 282, 2, 3) + b"72\0\0"
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + struct.pack("<L", 0)
    Image.new("RGB", (24, 20)).save(tmp_path / "odd.jpg", exif=exif)
    assert open_image(tmp_path / "odd.jpg", 3).size == (20, 24)


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
    """vision#2831, Promptvision#10: checkpoints of notebooks, and what Pillow names only."""
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
    """timm#334: it vanished without a word."""
    (tmp_path / "ant").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".cache").mkdir()
    assert list(class_folders(tmp_path)) == ["ant"]
    (tmp_path / "cat").symlink_to("/gone/cat")
    with pytest.raises(ValueError, match="cat: expected a folder, got a link to nothing"):
        class_folders(tmp_path)
