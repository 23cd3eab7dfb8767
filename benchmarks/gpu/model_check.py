"""Whether blocks and networks are right on the GPU at hand: a part of check.py.

A block without gradients takes kernels of its own (docs/fused_block.md): BatchNorm is folded, and
the grouped convolution takes the energies. `check_block` compares coded and plain blocks, of both
strides, with and without removed branches, with float64 layer by layer; by `fused`, in which
PyTorch has the products, and by `triton`. How fast they are is told by whole networks.

`guard` trains 200 steps on CIFAR-10, fused and layer by layer, and compares the losses.
"""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from bench_model import TINY, TINY_CLASSES, Contender, Runner, tiny_overrides
from operators import compared
from torch import Tensor

from coded_resnext import Codebook, CodedBottleneck
from coded_resnext.data.datasets import DATA_VARIABLE, load_dataset
from coded_resnext.data.image_sets import MemoryImages
from coded_resnext.models.block import EnergyRecord

GUARD_NETWORK = "resnext29_10x11d"
GUARD_STEPS, GUARD_BATCH, GUARD_LR = 200, 128, 0.05
GUARD_RULE = (
    "the mean loss of the last quarter of the steps differs from that of layer by layer, in the "
    "same order of the images, by at most the range of layer by layer over three orders"
)


@dataclass(frozen=True)
class EvaluatedBlock:
    """A block and the maps that it is given."""

    name: str
    in_channels: int
    channels: int
    width: int
    branches: int
    size: int
    """`H = W` of its input, in pixels."""
    batch: int
    stride: int = 1
    active: int | None = None
    """Of its branches for a class; None for a plain block."""
    keep: bool = False
    """Whether branches are removed."""

    def make(self, device: torch.device) -> CodedBottleneck:
        """Returns the block with BatchNorms that are not the identity, in float32."""
        torch.manual_seed(0)
        classes = 1000 if self.branches == 32 else 10
        book = Codebook.shipped(classes, self.branches, self.active) if self.active else None
        sizes = (self.in_channels, self.channels, self.width, self.branches)
        block = CodedBottleneck(*sizes, book, stride=self.stride, backend="torch")
        for name, value in [*block.named_parameters(), *block.named_buffers()]:
            if ("_bn." in name or "skip.1." in name) and value.is_floating_point():
                value.data.uniform_(0.5, 1.5)
        return block.eval().to(device)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the block's input, as a ReLU leaves it, and the mask."""
        shape = (self.batch, self.in_channels, self.size, self.size)
        x = torch.randn(shape, device=device).relu()
        leaves = {"x": x.contiguous(memory_format=torch.channels_last)}
        if self.keep:
            mask = torch.rand(self.batch, self.branches, device=device) < 0.5
            mask[:, 0] = True
            leaves["keep_mask"] = mask.float()
        return leaves


BLOCKS = [
    EvaluatedBlock("c2", 256, 256, 4, 32, 40, 64),
    EvaluatedBlock("c2, projection", 64, 256, 4, 32, 40, 64),
    EvaluatedBlock("c3, stride 2", 256, 512, 8, 32, 40, 64, stride=2),
    EvaluatedBlock("c4, coded", 1024, 1024, 16, 32, 10, 64, active=16),
    EvaluatedBlock("c4, coded, branches removed", 1024, 1024, 16, 32, 10, 64, active=16, keep=True),
    EvaluatedBlock("c5, coded, stride 2", 1024, 2048, 32, 32, 10, 64, stride=2, active=8),
]
TINY_BLOCKS = [
    EvaluatedBlock("plain", 24, 24, 2, 8, 5, 3),
    EvaluatedBlock("coded, stride 2", 16, 24, 4, 10, 5, 3, stride=2, active=5, keep=True),
]


def check_block(
    block: EvaluatedBlock, dtype: torch.dtype, backend: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Returns the errors of the output and the energies, and whether bits repeat."""
    module, inputs = block.make(device), block.inputs(device)
    rounded, exact = module.to(dtype), copy.deepcopy(module.to(dtype)).double()
    inputs["x"] = inputs["x"].to(dtype)

    def run(net: CodedBottleneck, chosen: str, wide: bool = False) -> list[Tensor]:
        net.backend = chosen
        given = {k: v.double() if wide else v for k, v in inputs.items()}
        with torch.no_grad():
            record = EnergyRecord()
            y = net(**given, record=record)
        return [y] if record.energies is None else [y, record.energies]

    def named(results: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(("y", "energies"), results, strict=False))

    actual, eager = run(rounded, backend), run(rounded, "torch")
    expected = run(exact, "torch", wide=True)
    # Energies stay in float32, but what they are taken of has been rounded.
    errors, wrong = compared(named(actual), named(eager), named(expected), dtype)
    said = f"block in evaluation, {block.name}, {backend}"
    faults = [f"{said} {fault}" for fault in wrong]
    for _ in range(repeats - 1):
        if not all(torch.equal(a, b) for a, b in zip(actual, run(rounded, backend), strict=True)):
            faults.append(f"{said}: other bits in one of {repeats} runs")
            break
    return {
        "block": block.name,
        "dtype": str(dtype),
        "backend": backend,
        "errors": errors,
        "wrong": faults,
    }


def guard(*, dry: bool) -> dict[str, Any]:
    """Returns the losses of the fused network beside those layer by layer, and whether they
    agree."""
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
    """Returns the mean loss of the last quarter of a training, the images in the order of a
    seed."""
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
