"""Pictures of test images: the pixels that were read, small enough to send along."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from coded_resnext.data.batches import batches
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.interpret import load_pictures, save_pictures
from coded_resnext.interpret.results import pictures_of

GREY = Preprocessing(6, 1, (0.3,), (0.4,))
COLOUR = Preprocessing(6, 3, (0.3, 0.4, 0.5), (0.2, 0.3, 0.4))


def decode(address: str) -> tuple[str, Image.Image]:
    """The kind and the picture."""
    head, text = address.split(",")
    assert head.startswith("data:image/")
    assert head.endswith(";base64")
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return str(image.format), image


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_small_pictures_have_the_very_pixels(preprocessing: Preprocessing) -> None:
    pixels = torch.randint(0, 256, (3, preprocessing.channels, 6, 6), dtype=torch.uint8)
    inputs = preprocessing.normalize(pixels.float() / 255)
    for address, expected in zip(pictures_of(inputs, preprocessing), pixels, strict=True):
        kind, image = decode(address)
        assert kind == "PNG"
        array = np.array(image)
        found = torch.from_numpy(array if array.ndim == 3 else array[:, :, None])
        assert torch.equal(found.permute(2, 0, 1), expected)


def test_large_pictures_are_made_small() -> None:
    inputs = COLOUR.normalize(torch.rand(1, 3, 200, 150))
    [address] = pictures_of(inputs, COLOUR)
    kind, image = decode(address)
    assert (kind, image.size) == ("JPEG", (72, 96))
    assert len(address) < 12_000


def test_intensities_outside_the_range_are_cut_off() -> None:
    [address] = pictures_of(torch.tensor([[[[-9.0, 9.0]]]]), GREY)
    assert np.array(decode(address)[1]).tolist() == [[0, 255]]


def test_chosen_places_are_written_and_read(tmp_path) -> None:
    images = GREY.normalize(torch.rand(30, 1, 6, 6))
    loader = batches(images, torch.zeros(30, dtype=torch.int64), 7)
    path = save_pictures([22, 3, 20], loader, GREY, tmp_path)
    pictures = load_pictures(path)
    assert list(pictures) == [3, 20, 22]
    for place, address in pictures.items():
        assert address == pictures_of(images[place : place + 1], GREY)[0]


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    loader = batches(torch.zeros(5, 1, 6, 6), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions: expected places below 5, got 7"):
        save_pictures([1, 7], loader, GREY, tmp_path)
    with pytest.raises(ValueError, match="images: expected 3 channels"):
        save_pictures([1], loader, COLOUR, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format_version": 2, "pictures": {}}',
        '{"format_version": 1, "pictures": {"x": "data:image/png;base64,"}}',
        '{"format_version": 1, "pictures": {"1": "https://example.org/a.png"}}',
        '{"format_version": 1, "pictures": {"1": 5}}',
    ],
)
def test_damaged_files_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "pictures.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"pictures.json: not a file of pictures"):
        load_pictures(path)
