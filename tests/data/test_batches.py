"""Training batches in memory: what they depend on, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coded_resnext.data.batches import Batch, RandomShift, TrainingBatches

IMAGES = torch.arange(11.0)[:, None, None, None].expand(11, 1, 4, 4).contiguous()
TARGETS = torch.arange(11)
PICTURES = torch.randn(11, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def make_loader(**changes: Any) -> TrainingBatches:
    arguments = {"images": IMAGES, "targets": TARGETS, "batch_size": 4, "seed": 1, **changes}
    return TrainingBatches(**arguments)


def batches_of(loader: TrainingBatches, epoch: int, start_step: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start_step)
    return list(loader)


def test_full_batches_of_distinct_samples() -> None:
    loader = make_loader()
    assert len(loader) == 2
    found = batches_of(loader, 1)
    assert [len(batch.images) for batch in found] == [4, 4]
    seen = torch.cat([batch.indices for batch in found])
    assert len(set(seen.tolist())) == 8
    for images, targets, indices in found:
        assert torch.equal(images[:, 0, 0, 0], targets.float())
        assert torch.equal(targets, TARGETS[indices])
    assert loader.describe(torch.tensor([3, 7])) == ["sample 3", "sample 7"]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(loader: TrainingBatches, epoch: int) -> list[int]:
        return torch.cat([batch.indices for batch in batches_of(loader, epoch)]).tolist()

    loader = make_loader()
    first = order(loader, 1)
    assert order(loader, 2) != first
    assert order(loader, 1) == first == order(make_loader(), 1)
    assert order(make_loader(seed=2), 1) != first


def test_a_pass_from_a_later_step_gives_the_same_bits() -> None:
    loader = make_loader(images=PICTURES, batch_size=3, augment=RandomShift(1))
    whole = batches_of(loader, 4)
    for start in range(4):
        rest = batches_of(loader, 4, start)
        assert len(rest) == 3 - start
        for batch, expected in zip(rest, whole[start:], strict=True):
            assert all(map(torch.equal, batch, expected))


def test_augmentation_follows_the_sample_not_the_process() -> None:
    def by_sample(loaders: list[TrainingBatches], epoch: int) -> dict[int, torch.Tensor]:
        found = [batch for loader in loaders for batch in batches_of(loader, epoch)]
        return {int(i): image for b in found for i, image in zip(b.indices, b.images, strict=True)}

    def make(**changes: Any) -> TrainingBatches:
        return make_loader(images=PICTURES, augment=RandomShift(1), **changes)

    alone = by_sample([make()], 1)
    shared = by_sample([make(rank=rank, world_size=2) for rank in range(2)], 1)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[i], shared[i]) for i in alone)
    later = by_sample([make()], 2)
    assert any(not torch.equal(alone[i], later[i]) for i in alone.keys() & later.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": TARGETS[:9]}, "images: expected as many as targets, got 11 images and 9"),
        ({"batch_size": 12}, r"batch_size: expected 1 to 11 \(the samples there are\), got 12"),
        ({"batch_size": 0}, "batch_size: expected 1 to 11 .* got 0"),
        ({"world_size": 3}, "batch_size: expected a multiple of 3 processes, got 4"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(**changes)
