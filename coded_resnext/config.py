"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, schedule and loss. SGD with Nesterov momentum, cosine from warm-up to the end."""

    epochs: int
    batch_size: int
    learning_rate: float
    """At the end of the warm-up."""
    final_learning_rate: float = 0.0
    """At the last step."""
    warmup_epochs: float = 0.0
    """Over these the learning rate grows linearly from zero."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On all parameters, BatchNorm's too, as published."""
    coding_weight: float = 6.0
    """`mu` of the total loss (8)."""
    exponent: float = 4.0
    """`q` of the coding loss (7)."""
    threshold: float = 0.0
    """`t` of the coding loss (7)."""
    label_smoothing: float = 0.0
    """Of the cross-entropy only."""
    seed: int = 0
    """Of the weights, the order of the images, their augmentation, and DropSubNNs."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("final_learning_rate", self.final_learning_rate, 0),
            ("warmup_epochs", self.warmup_epochs, 0),
            ("weight_decay", self.weight_decay, 0),
            ("coding_weight", self.coding_weight, 0),
            ("exponent", self.exponent, 1),
            ("threshold", self.threshold, 0),
            ("seed", self.seed, 0),
        ):
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name}: expected a finite number of at least {low}, got {value}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        for name, value in (("momentum", self.momentum), ("label_smoothing", self.label_smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected 0 <= value < 1, got {value}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected fewer than {self.epochs} epochs, got {self.warmup_epochs}"
            )

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        last = max(self.epochs * steps_per_epoch - 1 - warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min((step - warmup) / last, 1.0)))
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * cosine

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
