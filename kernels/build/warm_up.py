"""Compiling or loading a model's kernels before its first step, instead of in it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coded_resnext.kernels.checks import typed

# Any number of samples launches the same kernels; BatchNorm needs more than one.
SAMPLES = 2


@dataclass(frozen=True)
class WarmUp:
    """Counts of the kernels that a warm-up found or compiled, and its time."""

    cache_hits: int
    """Kernels of this package that were there: prebuilt, or in Triton's cache."""
    compiled: int
    """Kernels that had to be compiled."""
    seconds: float
    """Wall time of the warm-up, in seconds."""


@typed
def warm_up(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> WarmUp:
    """Runs one step on a copy of a model, so that all kernels of a real one are there afterwards.

    The model, its statistics and gradients, and the random numbers to come stay as they are. Call
    it in the mode (`train` or `eval`) and under the autocast of the steps to come. What depends on
    the number of samples, such as cuDNN's choice of algorithms, is not warmed up.

    Args:
        model: any, not yet wrapped for several processes.
        images: `[B, C, H, W]` as in a step, of which two are used; B at least 2.
        loss: from the copy and the images to a scalar, for losses with kernels of their own; by
            default the sum of the logits.

    Raises:
        ValueError: fewer than two images.
    """
    if images.ndim != 4 or len(images) < SAMPLES:
        raise ValueError(f"images: expected [2 or more, C, H, W], got {tuple(images.shape)}")
    start = time.perf_counter()
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), watched() as hits, torch.enable_grad():
        twin = copy.deepcopy(model)
        few = images[:SAMPLES].detach()
        total = twin(few).float().sum() if loss is None else loss(twin, few)
        total.backward()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
    return WarmUp(hits.count(True), hits.count(False), time.perf_counter() - start)


@contextmanager
def watched() -> Iterator[list[bool]]:
    """A list that grows by an entry for each kernel of this package that Triton is asked for.

    True where it was found compiled. A kernel that the process has launched before is not asked
    for again.
    """
    hits: list[bool] = []
    try:
        from triton import knobs
    except ImportError:
        yield hits
        return
    before = knobs.compilation.listener

    def listen(**event: Any) -> None:
        module = getattr(getattr(event["src"], "fn", None), "__module__", "")
        if module.startswith("coded_resnext."):
            hits.append(event["cache_hit"])
        if before is not None:
            before(**event)

    knobs.compilation.listener = listen
    try:
        yield hits
    finally:
        knobs.compilation.listener = before
