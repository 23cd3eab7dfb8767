"""Preprocessing, the digits and their split, batches and shifts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from coded_resnext.data.batches import Batches, RandomShift, batches
from coded_resnext.data.datasets import load_digits_split
from coded_resnext.data.preprocessing import Preprocessing, derive_seed

IMAGES = torch.arange(10.0)[:, None, None, None].expand(10, 1, 4, 4).contiguous()
TARGETS = torch.arange(10)


def test_digits_are_split_once_and_for_all_and_stratified() -> None:
    digits = load_digits_split()
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    every = torch.cat([digits.train_indices, digits.test_indices])
    assert sorted(every.tolist()) == list(range(1797))
    assert torch.equal(digits.test_indices, load_digits_split().test_indices)
    shares = torch.bincount(digits.test_targets) / torch.bincount(
        torch.cat([digits.train_targets, digits.test_targets])
    )
    assert shares.tolist() == pytest.approx([0.2] * 10, abs=0.004)
    original = load_digits()
    for images, targets, indices in (
        (digits.train_images, digits.train_targets, digits.train_indices),
        (digits.test_images, digits.test_targets, digits.test_indices),
    ):
        assert targets.tolist() == original.target[indices.numpy()].tolist()
        mean, std = digits.preprocessing.mean[0], digits.preprocessing.std[0]
        restored = ((images[:, 0] * std + mean) * 16).numpy()
        assert np.allclose(restored, original.images[indices.numpy()], atol=1e-5)
    # Normalised by the training images alone.
    assert float(digits.train_images.mean()) == pytest.approx(0, abs=1e-6)
    assert float(digits.train_images.std()) == pytest.approx(1, abs=1e-6)


def test_shift_moves_every_image_by_its_own_draw_and_repeats_the_border() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    draws = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    shifted = RandomShift(1)(image.repeat(200, 1, 1, 1), draws)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")[0, 0]
    windows = {(i, j): padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)}
    for shift, (down, right) in zip(shifted, (draws * 3).int().tolist(), strict=True):
        assert torch.equal(shift[0], windows[down, right])
    assert len({tuple(pair) for pair in (draws * 3).int().tolist()}) == 9


def test_evaluation_batches_keep_the_order() -> None:
    assert [len(t) for _, t in batches(IMAGES, TARGETS, 3)] == [3, 3, 3, 1]
    for images, targets in batches(IMAGES, TARGETS, 3):
        assert torch.equal(images[:, 0, 0, 0], targets.float())
    assert torch.equal(torch.cat([t for _, t in batches(IMAGES, TARGETS, 3)]), TARGETS)


def test_processes_share_the_evaluation_and_no_sample_comes_twice() -> None:
    shares = [Batches(IMAGES, TARGETS, 2, rank=rank, world_size=3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    targets = [t for share in shares for _, batch in share for t in batch.tolist()]
    assert sorted(targets) == list(range(10))


def test_derived_seeds_differ() -> None:
    assert len({derive_seed(s, e) for s in range(20) for e in range(20)}) == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGES, TARGETS[:9], 4), "images: expected as many as targets .* 10 images and 9"),
        ((IMAGES[:0], TARGETS[:0], 4), "images: .* 0 images and 0 targets"),
        ((IMAGES, TARGETS, 0), "batch_size: expected at least 1, got 0"),
    ],
)
def test_batches_refuse(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)


def test_preprocessing_of_pictures() -> None:
    grey = Preprocessing(size=8, channels=1, mean=(0.5,), std=(0.25,))
    white = grey(Image.new("RGB", (30, 20), "white"))
    assert white.shape == (1, 8, 8)
    assert white.unique().tolist() == [2.0]
    colour = Preprocessing(size=4, channels=3, mean=(0, 0, 0), std=(1, 1, 1))
    red = colour(Image.new("RGB", (4, 9), (255, 0, 51)))
    assert red.shape == (3, 4, 4)
    assert red.mean((1, 2)).tolist() == pytest.approx([1, 0, 0.2])
    for mode in ("L", "CMYK", "RGBA", "P"):
        assert colour(Image.new(mode, (5, 5))).shape == (3, 4, 4)
    assert Preprocessing.from_dict(grey.to_dict()) == grey


def test_preprocessing_cuts_the_centre() -> None:
    picture = Image.new("L", (24, 8), 0)
    picture.paste(255, (8, 0, 16, 8))
    middle = Preprocessing(size=8, channels=1, mean=(0,), std=(1,))(picture)
    assert (middle == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size: expected a positive number of pixels, got 0"),
        ({"channels": 2}, r"channels: expected 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"mean": (0.1, 0.2)}, "mean: expected 1 numbers, got 2"),
        ({"std": (0.0,)}, "std: expected numbers above 0"),
    ],
)
def test_preprocessing_refuses(change: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"size": 8, "channels": 1, "mean": (0.5,), "std": (0.5,)}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{**valid, **change})
