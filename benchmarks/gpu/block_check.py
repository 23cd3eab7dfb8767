"""Blocks in evaluation on the GPU at hand: right, and repeatable.

A part of check.py. A block without gradients takes kernels of its own (docs/fused_block.md):
BatchNorm is folded, and the grouped convolution takes the energies. Coded and plain blocks, of both
strides, with and without removed branches, are compared with float64 layer by layer; by `fused`, in
which PyTorch has the products, and by `triton`. How fast they are is told by whole networks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from conv3x3 import ROUNDING, error
from torch import Tensor

from coded_resnext import Codebook, CodedBottleneck
from coded_resnext.models.block import EnergyRecord

DTYPES = (torch.bfloat16, torch.float16)


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
        """The block with BatchNorms that are not the identity, in float32."""
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
        """The block's input, as a ReLU leaves it, and the mask."""
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
TINY = [
    EvaluatedBlock("plain", 24, 24, 2, 8, 5, 3),
    EvaluatedBlock("coded, stride 2", 16, 24, 4, 10, 5, 3, stride=2, active=5, keep=True),
]


def check_block(
    block: EvaluatedBlock, dtype: torch.dtype, backend: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Errors of the output and the energies, and whether bits repeat."""
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

    expected, eager = run(exact, "torch", wide=True), run(rounded, "torch")
    actual = run(rounded, backend)
    row: dict[str, Any] = {
        "block": block.name,
        "dtype": str(dtype),
        "backend": backend,
        "errors": {},
        "wrong": [],
    }
    said = f"block in evaluation, {block.name}, {backend}"
    for name, mine, theirs, value in zip(("y", "energies"), actual, eager, expected, strict=False):
        # Energies stay in float32, but what they are taken of has been rounded.
        limit = 2 * max(error(theirs, value), ROUNDING[dtype])
        row["errors"][name] = {"kernel": error(mine, value), "limit": limit}
        # Written so that a NaN is wrong.
        if not error(mine, value) <= limit:
            row["wrong"].append(
                f"{said} {name}: error {error(mine, value):.1e}, at most {limit:.1e}"
            )
    for _ in range(repeats - 1):
        if not all(torch.equal(a, b) for a, b in zip(actual, run(rounded, backend), strict=True)):
            row["wrong"].append(f"{said}: other bits in one of {repeats} runs")
            break
    return row
