"""MixUp and CutMix of a batch, with the soft targets that follow."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .config import TrainingConfig

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mixing(config: TrainingConfig, num_classes: int) -> Mixing | None:
    """What mixes a batch, or None where neither MixUp nor CutMix is on.

    The transforms are torchvision's: every image is mixed with its neighbour in the batch, by one
    share for all, drawn from PyTorch's default generator on the host. Images `[B, C, H, W]` and
    class indices `[B]` become images and class probabilities `[B, K]`; a batch that is left alone
    (`mixup_prob`) keeps its indices.

    Raises:
        ImportError: mixing is asked for and torchvision is not installed.
    """
    if not config.mixup and not config.cutmix:
        return None
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            "MixUp and CutMix need torchvision: pip install 'coded-resnext[train]'"
        ) from error
    transforms, weights = [], []
    if config.mixup:
        transforms.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
        weights.append(1 - config.mixup_switch_prob if config.cutmix else 1.0)
    if config.cutmix:
        transforms.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
        weights.append(config.mixup_switch_prob if config.mixup else 1.0)
    mixing: Mixing = v2.RandomApply([v2.RandomChoice(transforms, p=weights)], p=config.mixup_prob)
    return mixing
