"""The settings: their ranges, the schedule, and how processes share a batch."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_training import make_config


def test_learning_rate() -> None:
    config = make_config(epochs=10, warmup_epochs=2, min_lr=0.01)
    rates = [config.lr_at(step, 5) for step in range(50)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert rates[9] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    # Half-way down the cosine.
    middle = make_config(epochs=11, warmup_epochs=0).lr_at(5, 1)
    assert middle == pytest.approx(0.05)


def test_cool_down_stays_at_the_lowest_rate() -> None:
    config = make_config(epochs=10, warmup_epochs=2, min_lr=0.01, cooldown_epochs=3)
    assert config.total_epochs == 13
    assert [config.lr_at(step, 5) for step in range(49, 65)] == pytest.approx([0.01] * 16)
    assert config.lr_at(48, 5) > 0.01


def test_processes_share_a_batch() -> None:
    assert make_config(batch_size=512).local_batch_size(8) == 64
    assert make_config(batch_size=12, grad_accum_steps=3).local_batch_size(2) == 6
    message = (
        "batch_size: expected a multiple of 3 .3 processes, 1 accumulated parts each., got 512; "
        "choose 510 or 513, or another number of processes"
    )
    with pytest.raises(ValueError, match=message):
        make_config(batch_size=512).local_batch_size(3)
    with pytest.raises(ValueError, match=r"a multiple of 8 .* got 4; choose 8, or another"):
        make_config(batch_size=4, grad_accum_steps=4).local_batch_size(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: .* at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        ({"clip_grad": 0.0}, "clip_grad: expected a number above 0, got 0.0"),
        ({"momentum": 1.0}, "momentum: expected 0 <= value < 1, got 1.0"),
        ({"smoothing": 1.0}, "smoothing: expected 0 <= value < 1, got 1.0"),
        ({"model_ema_decay": 1.0}, "model_ema_decay: expected 0 <= value < 1, got 1.0"),
        ({"warmup_epochs": 4}, "warmup_epochs: expected fewer than 4 epochs, got 4"),
        ({"cooldown_epochs": -1}, "cooldown_epochs: .* at least 0, got -1"),
        ({"weight_decay": float("nan")}, "weight_decay: .* got nan"),
        ({"mixup": -0.1}, "mixup: .* at least 0, got -0.1"),
        ({"mixup_prob": 1.5}, "mixup_prob: expected a probability, got 1.5"),
        ({"mixup_switch_prob": -0.5}, "mixup_switch_prob: expected a probability, got -0.5"),
        ({"amp_dtype": "half"}, "amp_dtype: expected bfloat16 or float16, got 'half'"),
        ({"dist_bn": ""}, "dist_bn: expected reduce or broadcast, got ''"),
        ({"grad_accum_steps": 0}, "grad_accum_steps: .* at least 1, got 0"),
        ({"log_interval": 0}, "log_interval: .* at least 1, got 0"),
        ({"seed": -1}, "seed: .* got -1"),
        ({"mask_gradients": True, "mixup": 0.2}, "mask_gradients: expected neither mixup nor"),
        ({"mask_gradients": True, "torchcompile": "inductor"}, "mask_gradients: .* torchcompile"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**change)
