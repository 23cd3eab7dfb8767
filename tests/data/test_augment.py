"""Augmentation: every operation happens, as often as it should, and follows from the seed alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.preprocessing import Preprocessing

PLAIN = Preprocessing(8, 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NONE: dict[str, Any] = {"crop_padding": 0, "hflip": 0.0}


def ramp(size: int = 8) -> Image.Image:
    """Every pixel differs from the others."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0] = 10 + np.arange(size * size).reshape(size, size)
    pixels[..., 1] = 255 - pixels[..., 0]
    return Image.fromarray(pixels)


def apply(count: int, image: Image.Image | None = None, **settings: Any) -> torch.Tensor:
    """Red intensities 0..255 of an image augmented with the seeds 0, 1, .."""
    transform = TrainTransform(Augmentation(**settings), PLAIN)
    found = transform([image or ramp()] * count, range(count))
    return (found[:, 0] * 255).round()


def distinct(images: torch.Tensor) -> int:
    return len({tuple(image.flatten().tolist()) for image in images})


def test_nothing_asked_changes_nothing() -> None:
    assert torch.equal(apply(1, **NONE)[0], torch.from_numpy(np.array(ramp()))[..., 0].float())


def test_images_are_normalised() -> None:
    prep = Preprocessing(8, 3, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
    found = TrainTransform(Augmentation(**NONE), prep)([ramp()], [0])[0]
    assert torch.allclose(found, prep(ramp()), atol=1e-6)


def test_padded_crops_come_from_all_places_and_are_black_outside() -> None:
    image = torch.from_numpy(np.array(ramp()))[..., 0].float()
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    seen = {
        next(k for k, window in enumerate(windows) if torch.equal(window, found))
        for found in apply(150, crop_padding=1, hflip=0.0)
    }
    assert seen == set(range(9))


@pytest.mark.parametrize(("flag", "axis"), [("hflip", 1), ("vflip", 0)])
def test_flips(flag: str, axis: int) -> None:
    image = torch.from_numpy(np.array(ramp()))[..., 0].float()
    found = apply(200, crop_padding=0, **{"hflip": 0.0, flag: 0.3})
    flipped = sum(torch.equal(each, image.flip(axis)) for each in found)
    assert sum(torch.equal(each, image) for each in found) == 200 - flipped
    assert 40 <= flipped <= 80


def test_resized_crops_have_the_areas_that_were_asked_for() -> None:
    """The steepness of a ramp says how large the part was that became the image."""
    ramp_image = Image.fromarray(
        np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    )
    settings = {"hflip": 0.0, "ratio": (1.0, 1.0), "train_interpolation": "bilinear"}
    spans = {}
    for scale in ((1.0, 1.0), (0.25, 0.25)):
        found = apply(20, ramp_image, scale=scale, **settings)
        spans[scale] = (found[:, 4, -1] - found[:, 4, 0]).mean()
    assert float(spans[1.0, 1.0]) == pytest.approx(252 * 7 / 8, rel=0.03)
    # A quarter of the area is half the width.
    assert float(spans[0.25, 0.25]) == pytest.approx(126 * 7 / 8, rel=0.06)


def test_rand_augment_is_timms_and_obeys_its_numbers() -> None:
    picture = ramp(32)
    untouched = np.array(picture)
    changed = {}
    for config in ("rand-m4-n1-p1.0", "rand-m4-n3-p1.0", "rand-m4-n3-p0.0"):
        transform = TrainTransform(
            Augmentation(**NONE, aa=config), Preprocessing(32, 3, (0.0,) * 3, (1.0,) * 3)
        )
        images = (transform([picture] * 60, range(60)) * 255).round().byte()
        expected = torch.from_numpy(untouched).permute(2, 0, 1)
        changed[config] = sum(not torch.equal(image, expected) for image in images)
    assert changed["rand-m4-n3-p0.0"] == 0
    assert 30 < changed["rand-m4-n1-p1.0"] < changed["rand-m4-n3-p1.0"]


def test_rand_augment_fills_with_the_mean_colour() -> None:
    white = Image.new("RGB", (32, 32), "white")
    prep = Preprocessing(32, 3, (0.2, 0.2, 0.2), (1.0, 1.0, 1.0))
    transform = TrainTransform(Augmentation(**NONE, aa="rand-m9-n1-p1.0"), prep)
    corners = transform([white] * 80, range(80))[:, 0, ::31, ::31].flatten()
    # What a rotation or shift brings in: 0.2 at intensity, 0 when normalised.
    assert int((corners.abs() < 0.01).sum()) > 5


@pytest.mark.parametrize("recount", [1, 3])
def test_random_erasing(recount: int) -> None:
    white = Image.new("RGB", (64, 64), "white")
    prep = Preprocessing(64, 3, (0.0,) * 3, (1.0,) * 3)
    settings = {"reprob": 0.4, "remode": "const", "recount": recount}
    transform = TrainTransform(Augmentation(**NONE, **settings), prep)
    erased = transform([white] * 300, range(300))[:, 0] == 0
    shares = erased.double().mean((1, 2))
    assert 85 <= int((shares > 0).sum()) <= 155
    assert float(shares.max()) <= 0.36
    # One part fills the rectangle around it; of three, some lie apart.
    apart = 0
    for mask in erased[shares > 0]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        apart += int(mask.sum()) < int(box)
    assert (apart > 20) == (recount == 3)
    assert recount == 3 or apart == 0


def test_noise_erases_after_normalisation() -> None:
    """timm's noise is standard normal, which it is only where the images are normalised."""
    transform = TrainTransform(
        Augmentation(**NONE, reprob=1.0), Preprocessing(64, 3, (0.5,) * 3, (0.25,) * 3)
    )
    found = transform([Image.new("RGB", (64, 64), (128, 128, 128))] * 40, range(40))
    noise = found[(found - (128 / 255 - 0.5) / 0.25).abs() > 1e-6]
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_an_image_depends_on_its_seed_and_on_nothing_else() -> None:
    settings = {"crop_padding": 2, "aa": "rand-m9-n2-mstd0.5", "reprob": 0.5}
    transform = TrainTransform(Augmentation(**settings), PLAIN)
    together = transform([ramp()] * 12, range(12))
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    for seed in (7, 0, 11):
        assert torch.equal(transform([ramp()], [seed])[0], together[seed])
    assert distinct(together) > 9


def test_the_global_generators_are_left_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002, S311

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    apply(3, crop_padding=2, aa="rand-m9-n2", reprob=1.0)
    assert draw() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "crop_padding: expected at least 0, got -1"),
        ({"scale": (0.5, 0.2)}, "scale: expected two rising positive numbers"),
        ({"ratio": (1.0,)}, "ratio: expected two rising positive numbers"),
        ({"hflip": 1.5}, "hflip: expected a probability, got 1.5"),
        ({"reprob": -0.1}, "reprob: expected a probability, got -0.1"),
        ({"remode": "grey"}, "remode: expected one of const, rand, pixel; got 'grey'"),
        ({"train_interpolation": "x"}, "train_interpolation: expected one of random"),
        ({"recount": 0}, "recount: expected at least 1, got 0"),
        ({"aa": "augmix"}, "aa: expected a RandAugment of timm .* got 'augmix'"),
        ({"aa": "rand-q3"}, "aa: expected a RandAugment of timm .* got 'rand-q3'"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTransform(Augmentation(**settings), PLAIN)
