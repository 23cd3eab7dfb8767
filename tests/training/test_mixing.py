"""MixUp and CutMix: images and soft targets that belong together."""

from __future__ import annotations

import pytest
import torch
from support.tiny_training import BOOK, make_config, make_model

from coded_resnext import CodedLoss
from coded_resnext.data.batches import Batch
from coded_resnext.training.processes import World
from coded_resnext.training.step import TrainStep, make_mixing

TARGETS = torch.tensor([0, 1, 2, 0])
# Every image is filled with its class, so that a mean says what was mixed.
IMAGES = TARGETS.float()[:, None, None, None].expand(4, 1, 10, 10).contiguous()


def mixed(seed: int = 0, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    mixing = make_mixing(make_config(**changes), 3)
    assert mixing is not None
    torch.manual_seed(seed)
    return mixing(IMAGES, TARGETS)


@pytest.mark.parametrize("change", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_targets_say_how_much_of_each_class_is_in_an_image(change: dict[str, float]) -> None:
    for seed in range(5):
        images, targets = mixed(seed, **change)
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)
        expected = targets @ torch.arange(3.0)
        assert images.mean((1, 2, 3)).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    values = images[1].unique()
    assert len(values) == (1 if "mixup" in change else 2)


def test_probabilities() -> None:
    assert make_mixing(make_config(), 3) is None
    images, targets = mixed(mixup=0.8, mixup_prob=0.0)
    assert torch.equal(images, IMAGES)
    assert torch.equal(targets, TARGETS)

    def cut(seed: int, switch: float) -> bool:
        images, _ = mixed(seed, mixup=1.0, cutmix=1.0, mixup_switch_prob=switch)
        return all(len(image.unique()) <= 2 for image in images) and bool(
            (images == images.round()).all()
        )

    assert all(cut(seed, 1.0) for seed in range(10))
    assert not any(cut(seed, 0.0) for seed in range(10))
    assert 0 < sum(cut(seed, 0.5) for seed in range(20)) < 20


def test_a_step_mixes_by_seed_and_step_and_uses_the_mean_codeword() -> None:
    config = make_config(mixup=0.8, coding_weight=2.0, warmup_epochs=0)
    model = make_model(drop_branches=0.0)
    step = TrainStep(model, config, World(), 3)
    seen = []
    real = step.loss.forward
    step.loss.forward = lambda *a: seen.append(a) or real(*a)  # type: ignore[method-assign]
    batch = Batch(IMAGES, TARGETS, torch.arange(4))
    step(batch, 0)
    step(batch, 0)
    step(batch, 1)
    (_, energies, targets), (_, _, again), (_, _, later) = seen
    assert targets.shape == (4, 3)
    assert torch.equal(targets, again)
    assert not torch.equal(targets, later)
    # (7) with the codeword's mean, written out.
    mean = targets @ BOOK.codewords.float()
    energies = energies[0].detach()
    coding = (energies * 2 / 4 - mean).abs().pow(4).mean()
    terms = CodedLoss([BOOK], weight=2.0)(torch.zeros(4, 3), [energies], targets)
    assert float(terms.coding[0]) == pytest.approx(float(coding), rel=1e-6)
