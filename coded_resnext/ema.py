"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .models import CodedResNeXt


class WeightAverage:
    """A second network whose weights follow those of the first, (1 - decay) of the way each step.

    BatchNorm's running statistics are averaged like the weights.

    Args:
        model: the network to follow; the average begins at its weights.
        decay: of the average, `0 <= decay < 1`.
        warmup: at step t use `(1 + t) / (10 + t)` where that is less, so that a short run's
            average does not stay at the fresh weights.
    """

    def __init__(self, model: CodedResNeXt, decay: float, *, warmup: bool = False) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], statistics: Sequence[Tensor], step: int) -> None:
        """Take in the weights after a step.

        Args:
            parameters: of the network, in its order.
            statistics: floating-point buffers of the network, in its order.
            step: counted from 0 over the whole run.
        """
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.model.parameters()), list(parameters), step)
        own = running_statistics(self.model)
        if own:
            average(own, list(statistics), step)


def running_statistics(model: torch.nn.Module) -> list[Tensor]:
    """The floating-point buffers of a network: BatchNorm's running means and variances."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]
