"""The accuracy guard of check.py: 200 steps on CIFAR-10, fused and layer by layer."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch
from bench_model import TINY, TINY_CLASSES, tiny_overrides
from contenders import Contender, Runner
from torch import Tensor

from coded_resnext.data.datasets import DATA_VARIABLE, load_dataset
from coded_resnext.data.image_sets import MemoryImages

GUARD_NETWORK = "resnext29_10x11d"
GUARD_STEPS, GUARD_BATCH, GUARD_LR = 200, 128, 0.05
GUARD_RULE = (
    "the mean loss of the last quarter of the steps differs from that of layer by layer, in the "
    "same order of the images, by at most the range of layer by layer over three orders"
)


def guard(*, dry: bool) -> dict[str, Any]:
    """Losses of the fused network beside those layer by layer, and whether they agree."""
    steps = 4 if dry else GUARD_STEPS
    if dry:
        size, batch = TINY
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (16, 3, size, size), generator=generator, dtype=torch.uint8)
        targets = torch.randint(TINY_CLASSES, (16,), generator=generator)
    elif DATA_VARIABLE not in os.environ:
        return {"left_out": f"{DATA_VARIABLE} names no folder with cifar10"}
    else:
        batch, train = GUARD_BATCH, load_dataset("cifar10").train
        assert isinstance(train, MemoryImages)
        images, targets = train.pixels, train.targets
    kinds = {name: Contender("coded", name) for name in ("torch", "fused")}
    eager = [final_loss(kinds["torch"], images, targets, batch, steps, seed) for seed in range(3)]
    fused = final_loss(kinds["fused"], images, targets, batch, steps, 0)
    noise, apart = max(eager) - min(eager), abs(fused - eager[0])
    return {
        "rule": GUARD_RULE,
        "steps": steps,
        "layer_by_layer": eager,
        "fused": fused,
        "apart": apart,
        "noise": noise,
        # Written so that a NaN is not kept.
        "kept": apart <= noise,
    }


def final_loss(
    contender: Contender, images: Tensor, targets: Tensor, batch: int, steps: int, seed: int
) -> float:
    """Mean loss of the last quarter of a training, the images in the order of a seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    overrides = tiny_overrides(contender) if images.shape[-1] == TINY[0] else {}
    order = torch.Generator().manual_seed(seed)
    runner = Runner(contender, GUARD_NETWORK, images[:1].to(device), targets, dtype, overrides)
    for group in runner.optimizer.param_groups:
        group["lr"] = GUARD_LR
    # Of the dropped branches.
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=order)
        pixels = images[chosen].to(device).float() / 127.5 - 1
        runner.images = pixels.contiguous(memory_format=torch.channels_last)
        runner.targets = targets[chosen].to(device)
        losses.append(runner.train())
    return statistics.fmean(float(loss) for loss in losses[-(steps // 4) :])
