"""Going through a loader with a network: mode, device, checks, progress, and partial passes.

Shapes: B samples of a batch, N branches of a block, K classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..models import CodedResNeXt

Loader = Iterable[tuple[Tensor, Tensor]]
"""Batches of images `[B, C, H, W]` and class indices `[B]`; every iteration starts afresh."""
Item = TypeVar("Item")


@contextmanager
def evaluating(model: CodedResNeXt) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def require_coded_blocks(model: CodedResNeXt) -> None:
    """Refuse a network without coded blocks, on which most experiments are not defined."""
    if not model.coded_blocks:
        raise ValueError(
            "model: expected at least one coded block, got a plain network, which has no codebook"
        )


def batches(model: CodedResNeXt, loader: Loader, activity: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The checked batches of a loader on the device (and in the dtype) of the model, with progress.

    Args:
        model: whose device, dtype and number of classes count.
        loader: batches of images `[B, C, H, W]` and targets `[B]`.
        activity: what is being done, for the progress bar.

    Raises:
        ValueError: the loader has no batch, images are not floating-point `[B, C, H, W]`, or
            targets are not one class index of the model for each image.
    """
    parameter = next(model.parameters())
    empty = True
    for images, targets in with_progress(loader, activity):
        empty = False
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(
                "images: expected a floating-point tensor [B, C, H, W] with B >= 1, "
                f"got {images.dtype} {list(images.shape)}"
            )
        if targets.shape != images.shape[:1] or targets.dtype not in _INDEX_TYPES:
            raise ValueError(
                f"targets: expected {len(images)} integer class indices, "
                f"got {targets.dtype} {list(targets.shape)}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= model.num_classes:
            raise ValueError(
                f"targets: expected classes 0 to {model.num_classes - 1} of the model, "
                f"got {low if low < 0 else high}"
            )
        yield images.to(parameter), targets.to(parameter.device).long()
    if empty:
        raise ValueError("loader: expected at least one batch, got none")


def coded_inputs(model: CodedResNeXt, x: Tensor) -> list[Tensor]:
    """The inputs of all coded blocks, from that of the first one; to `resume` from."""
    inputs = []
    for block in model.blocks[model.blocks.index(model.coded_blocks[0]) :]:
        if block.is_coded:
            inputs.append(x)
        if len(inputs) == len(model.coded_blocks):
            break
        x, _ = block(x)
    return inputs


def resume(
    model: CodedResNeXt, x: Tensor, start: int, keep_masks: Sequence[Tensor | None]
) -> Tensor:
    """The logits of a network that goes on from the input of one of its coded blocks.

    This equals `model(images, keep=...)` at a fraction of the cost when many masks are tried on
    the same images.

    Args:
        model: in evaluation mode.
        x: input of the coded block.
        start: which coded block, counted from 0.
        keep_masks: `[B, N]` or None for every coded block from `start` on, (10).

    Returns:
        `[B, K]`.
    """
    return resume_with_energies(model, x, start, keep_masks)[0]


def resume_with_energies(
    model: CodedResNeXt, x: Tensor, start: int, keep_masks: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """As `resume`; besides the logits the energies `[B, N]` of the coded blocks from `start` on."""
    masks = iter(keep_masks)
    all_energies = []
    for block in model.blocks[model.blocks.index(model.coded_blocks[start]) :]:
        if block.is_coded:
            x, energies = block(x, keep_mask=next(masks))
            all_energies.append(energies)
        else:
            x, _ = block(x)
    return model.head(x.mean((2, 3))), all_energies


_INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def with_progress(loader: Iterable[Item], activity: str, unit: str = "batch") -> Iterable[Item]:
    """The items behind a progress bar, where tqdm is installed and a person is watching."""
    if not sys.stderr.isatty():
        return loader
    try:
        from tqdm import tqdm
    except ImportError:
        return loader
    shown: Iterable[Item] = tqdm(loader, desc=activity, unit=unit, leave=False, file=sys.stderr)
    return shown
