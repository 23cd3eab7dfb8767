"""Pictures of every kind become 8-bit RGB or grey, upright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coded_resnext.data.preprocessing import Preprocessing, to_channels

ORIENTATION = 0x0112


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 300, 32896], [25700, 65535, 128]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{ending}")
    with Image.open(tmp_path / f"deep.{ending}") as image:
        rgb, grey = to_channels(image, 3), to_channels(image, 1)
    expected = np.array([[0, 1, 128], [100, 255, 0]])
    assert np.array_equal(np.asarray(grey), expected)
    assert np.array_equal(np.asarray(rgb), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("largest", [1, 255, 65535, 70000])
def test_32_bits_are_refused_whatever_the_numbers(tmp_path: Path, largest: int) -> None:
    """Pillow#452, #3838, #274, unsloth#10094: small numbers were taken for 16 bits: black.

    Pillow's mode of 32 bits is that of a PGM of 16 bits too, which is read.
    """
    numbers = Image.fromarray(np.array([[0, largest]], dtype=np.int32))
    assert numbers.mode == "I"
    numbers.save(tmp_path / "numbers.tif")
    with Image.open(tmp_path / "numbers.tif") as stored:
        for image in (numbers, stored):
            with pytest.raises(ValueError, match="8 or 16 bits for a pixel, got 32-bit integers"):
                to_channels(image, 1)
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 1 65535\n\0\0\xff\xff")
    with Image.open(tmp_path / "deep.pgm") as deep:
        assert np.asarray(to_channels(deep, 1)).tolist() == [[0, 255]]


def test_a_drawing_in_the_alpha_channel_alone_is_refused() -> None:
    """DIGITS#85: without its alpha channel every such icon is the same square."""
    icon = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (2, 2, 6, 6))
    for image in (icon, icon.convert("LA")):
        with pytest.raises(ValueError, match="alpha channel alone"):
            to_channels(image, 3)
    icon.putpixel((3, 3), (255, 0, 0, 255))
    assert to_channels(icon, 3).getpixel((3, 3)) == (255, 0, 0)
    assert to_channels(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), 3).getpixel((0, 0)) == (9, 9, 9)


def test_32_bit_floating_point_is_refused() -> None:
    with pytest.raises(ValueError, match="got 32-bit floating-point numbers"):
        to_channels(Image.new("F", (2, 2)), 3)


def test_the_orientation_of_a_camera_is_applied(tmp_path: Path) -> None:
    picture = Image.new("L", (6, 4), 0)
    picture.paste(255, (0, 0, 3, 4))  # left half white
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the top of the scene is at the right: turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        upright = np.asarray(to_channels(image, 1))
    assert upright.shape == (6, 4)
    assert (upright[:3] == 255).all()
    assert (upright[3:] == 0).all()


def test_colour_spaces(tmp_path: Path) -> None:
    def colour(image: Image.Image) -> tuple[int, ...]:
        return tuple(np.asarray(to_channels(image, 3))[0, 0].tolist())

    assert colour(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert colour(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    # All cyan and nothing else is the absence of red; no ink is white.
    assert colour(Image.new("CMYK", (2, 2), (255, 0, 0, 0))) == (0, 255, 255)
    assert colour(Image.new("CMYK", (2, 2), (0, 0, 0, 0))) == (255, 255, 255)
    assert colour(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == (10, 20, 30)
    assert colour(Image.new("LA", (2, 2), (40, 0))) == (40, 40, 40)
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    with Image.open(tmp_path / "print.jpg") as image:
        assert image.mode == "CMYK"
        assert colour(image) == (255, 255, 255)
    frames = [Image.new("P", (3, 3), index) for index in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "moving.gif") as image:
        assert colour(image) == (250, 0, 0)


def test_preprocessing_resizes_the_shorter_side_and_cuts_the_centre() -> None:
    picture = Image.new("L", (40, 20), 0)
    picture.paste(255, (15, 5, 25, 15))  # the central half of the shorter side
    cut = Preprocessing(10, 1, (0.0,), (1.0,), resize=20)
    assert cut(picture).shape == (1, 10, 10)
    assert float(cut(picture).min()) == 1.0
    whole = Preprocessing(10, 1, (0.0,), (1.0,))
    assert float(whole(picture)[0, 0, 0]) == pytest.approx(0, abs=0.05)
    assert Preprocessing.from_dict(cut.to_dict()) == cut
    # Files written before there was a resize.
    older = {key: value for key, value in cut.to_dict().items() if key != "resize"}
    assert Preprocessing.from_dict(older) == whole
    with pytest.raises(ValueError, match="resize: expected at least the size, 10 pixels, got 9"):
        Preprocessing(10, 1, (0.0,), (1.0,), resize=9)
