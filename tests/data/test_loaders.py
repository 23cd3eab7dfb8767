"""Loaders: the same samples on any number of processes and workers; damage skipped or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_data import write_images

from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.batches import Batch
from coded_resnext.data.datasets import find_image_folder
from coded_resnext.data.image_sets import ImageSet, MemoryImages
from coded_resnext.data.loaders import EvalImages, TrainImages
from coded_resnext.data.preprocessing import Preprocessing

PREP = Preprocessing(12, 3, (0.5,) * 3, (0.25,) * 3)
NOISY = TrainTransform(
    Augmentation(crop_padding=2, aa="rand-m9-n2-mstd0.5", reprob=0.5, recount=3), PREP
)


def memory(count: int = 37) -> MemoryImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    names = [f"image {index}" for index in range(count)]
    return MemoryImages(pixels, torch.arange(count) % 5, names)


@pytest.fixture
def files(tmp_path: Path) -> ImageSet:
    """Forty images in two classes."""
    for split in ("train", "test"):
        write_images(tmp_path / split, {"ant": 20, "bee": 20})
    return find_image_folder(tmp_path).train


def one_epoch(loader: TrainImages, epoch: int = 1, start_step: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start_step)
    return list(loader)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.images, b.images)


def test_an_epoch_holds_full_batches_of_different_images() -> None:
    images = memory()
    loader = TrainImages(images, NOISY, 8, seed=3)
    batches = one_epoch(loader)
    assert len(batches) == len(loader) == 4
    seen = torch.cat([batch.indices for batch in batches])
    assert len(set(seen.tolist())) == 32
    for batch in batches:
        assert batch.images.shape == (8, 3, 12, 12)
        assert torch.equal(batch.targets, images.targets[batch.indices])
    assert loader.describe(batches[0].indices[:1]) == [f"image {batches[0].indices[0]}"]
    other = one_epoch(loader, 2)
    assert not torch.equal(other[0].indices, batches[0].indices)
    assert_same(one_epoch(loader, 1), batches)
    assert not torch.equal(
        one_epoch(TrainImages(images, NOISY, 8, seed=4))[0].indices, batches[0].indices
    )


def test_an_image_is_augmented_anew_in_every_epoch() -> None:
    loader = TrainImages(memory(8), NOISY, 8, seed=0)
    [first], [second] = one_epoch(loader, 1), one_epoch(loader, 2)
    unsorted = [batch.images[batch.indices.argsort()] for batch in (first, second)]
    same = [torch.equal(a, b) for a, b in zip(*unsorted, strict=True)]
    assert sum(same) <= 1


def test_a_balanced_order_has_every_class_alike_and_no_copies() -> None:
    """timm#1004, vision#2563: rare classes come again, each time augmented otherwise."""
    targets = torch.tensor([0] * 100 + [1] * 15 + [3] * 5)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 12, 12, 3), dtype=np.uint8)
    images = MemoryImages(pixels, targets, [""] * 120)
    counts, copies = torch.zeros(4), 0
    for epoch in range(1, 11):
        batches = one_epoch(TrainImages(images, NOISY, 8, seed=0, balanced=True), epoch)
        assert sum(len(batch.targets) for batch in batches) == 120
        counts += torch.cat([batch.targets for batch in batches]).bincount(minlength=4)
        for batch in batches:
            assert torch.equal(batch.targets, targets[batch.indices])
        seen = torch.cat([batch.images for batch in batches]).flatten(1)
        copies += 120 - len(seen.unique(dim=0))
    # 1,200 draws of three classes: the deviation of a count is 16.
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 400).abs().max() < 5 * 16.4
    # Some draws of the augmentation come out alike; of images that come again all would.
    assert copies < 0.05 * 1200
    shares = [
        one_epoch(TrainImages(images, NOISY, 8, seed=0, balanced=True, rank=r, world_size=2), 10)
        for r in (0, 1)
    ]
    for first, second, batch in zip(*shares, batches, strict=True):
        joined = torch.stack([first.indices, second.indices], 1).flatten()
        assert torch.equal(joined, batch.indices)


def test_workers_do_not_matter_nor_does_resuming() -> None:
    expected = one_epoch(TrainImages(memory(), NOISY, 8, seed=0), 3)
    loader = TrainImages(memory(), NOISY, 8, seed=0, workers=2)
    assert_same(one_epoch(loader, 3), expected)
    assert_same(one_epoch(loader, 3, start_step=2), expected[2:])
    assert_same(one_epoch(TrainImages(memory(), NOISY, 8, seed=0), 3, start_step=3), expected[3:])


def test_ranks_share_the_batches_of_one_process() -> None:
    whole = one_epoch(TrainImages(memory(), NOISY, 8, seed=0))
    ranks = [
        one_epoch(TrainImages(memory(), NOISY, 8, seed=0, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [len(part.indices) for part in parts] == [4, 4]
        order = torch.cat([part.indices for part in parts])
        assert set(order.tolist()) == set(batch.indices.tolist())
        images = torch.cat([part.images for part in parts])
        assert torch.equal(images[order.argsort()], batch.images[batch.indices.argsort()])


def test_nothing_random_is_used_up() -> None:
    state = torch.random.get_rng_state()
    for workers in (0, 1):
        one_epoch(TrainImages(memory(), NOISY, 8, seed=0, workers=workers))
        list(EvalImages(memory(), PREP, workers=workers))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("workers", "world_sizes"), [(0, (1, 2, 5)), (2, (1,))])
def test_every_sample_is_evaluated_exactly_once_on_any_number_of_ranks(
    workers: int, world_sizes: tuple[int, ...]
) -> None:
    images = memory(37)
    for world_size in world_sizes:
        seen = []
        for rank in range(world_size):
            loader = EvalImages(images, PREP, 8, rank=rank, world_size=world_size, workers=workers)
            batches = list(loader)
            assert len(batches) == len(loader)
            seen += [
                (tuple(p.flatten().tolist()), int(t))
                for b in batches
                for p, t in zip(*b, strict=True)
            ]
        expected = [
            (tuple(PREP(images.image(index)).flatten().tolist()), int(images.targets[index]))
            for index in range(37)
        ]
        assert sorted(seen) == sorted(expected)
        if world_size == 1:
            assert seen == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_skipped_counted_and_listed(
    files: ImageSet, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in (7, 8):
        Path(files.name(index)).write_bytes(b"no image")
    loader = TrainImages(files, NOISY, 10, seed=0, workers=workers, max_damaged=0.05)
    for epoch in (1, 2):
        batches = one_epoch(loader, epoch)
        used = torch.cat([batch.indices for batch in batches]).tolist()
        # The next readable image takes their places.
        assert sorted(used) == sorted([*range(7), 9, 9, *range(9, 40)])
        for batch in batches:
            assert batch.targets.tolist() == files.targets[batch.indices].tolist()
    assert sorted(loader.damaged.reasons) == [files.name(7), files.name(8)]
    assert capsys.readouterr().err.count("left out: ") == 2


@pytest.mark.parametrize(("workers", "damage"), [(0, 3), (0, 40), (1, 40)])
def test_too_much_damage_ends_the_training(files: ImageSet, workers: int, damage: int) -> None:
    for index in range(damage):
        Path(files.name(index)).write_bytes(b"no image")
    loader = TrainImages(files, NOISY, 10, seed=0, workers=workers, max_damaged=0.05)
    with pytest.raises(ValueError, match=r"at most 2 damaged images, got more: .*(ant|bee)"):
        one_epoch(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_out_the_same_damaged_images(files: ImageSet, workers: int) -> None:
    """Batches stay full, so that all passes round alike."""
    Path(files.name(25)).write_bytes(b"no image")
    loader = EvalImages(files, PREP, 8, workers=workers)
    for _ in range(2):
        batches = list(loader.batches())
        assert torch.cat([b.indices for b in batches]).tolist() == [*range(25), *range(26, 40)]
        assert [len(b.images) for b in batches] == [8, 8, 8, 8, 7]
    Path(files.name(3)).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"at most 1 .*bee.00005\.png.*ant.00003\.png") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected 1 to 37 .*got 38"):
        TrainImages(memory(), NOISY, 38, seed=0)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, got 8"):
        TrainImages(memory(), NOISY, 8, seed=0, world_size=3)
    with pytest.raises(ValueError, match="workers: expected at least 0, got -1"):
        TrainImages(memory(), NOISY, 8, seed=0, workers=-1)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        EvalImages(memory(), PREP, 0)
    with pytest.raises(ValueError, match="images: expected at least one to evaluate on, got none"):
        EvalImages(memory(0), PREP)
