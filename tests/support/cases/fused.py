"""Blocks of every kind for the tests of the fused data flow, and what a step of one leaves."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from support.helpers import map_and_energies
from torch import Tensor

from coded_resnext import Codebook, CodedBottleneck, CodedLoss

BATCH = 3


@dataclass(frozen=True)
class BlockCase:
    """A block, how it is run, and the regime that it stands for."""

    name: str
    coded: bool = True
    in_channels: int = 24
    stride: int = 1
    train: bool = True
    keep: bool = False

    def make(self) -> CodedBottleneck:
        """The block in float64, its BatchNorms away from their initial values."""
        torch.manual_seed(3)
        book = Codebook.shipped(10, 10, 5) if self.coded else None
        block = CodedBottleneck(
            self.in_channels,
            24,
            4 if self.coded else 2,
            10 if self.coded else 8,
            book,
            stride=self.stride,
            drop_branches=0.3,
            backend="reference",
        ).double()
        for name, value in [*block.named_parameters(), *block.named_buffers()]:
            if "_bn." in name or "skip.1." in name:
                with torch.no_grad():
                    if value.is_floating_point():
                        value.uniform_(0.5, 1.5)
        return block.train(self.train)

    def inputs(self) -> dict[str, Tensor]:
        """The block's input, the gradient of its output, classes and masks."""
        generator = torch.Generator().manual_seed(5)
        out = -(-5 // self.stride)
        x = torch.randn(BATCH, self.in_channels, 5, 5, generator=generator).relu()
        grad = torch.randn(BATCH, 24, out, out, generator=generator)
        actual = {"x": x, "grad": grad, "targets": torch.tensor([0, 4, 9])}
        if self.coded and self.train:
            actual["drop_mask"] = torch.ones(BATCH, 10).bernoulli(0.7, generator=generator) / 0.7
        if self.keep:
            actual["keep_mask"] = torch.ones(BATCH, 10).bernoulli(0.6, generator=generator)
        return actual


CASES = (
    BlockCase("coded"),
    BlockCase("coded, keeping some branches", keep=True),
    BlockCase("coded, projection", in_channels=16),
    BlockCase("coded, stride 2", in_channels=16, stride=2),
    BlockCase("coded, evaluation", train=False, keep=True),
    BlockCase("coded, evaluation, stride 2", in_channels=16, stride=2, train=False),
    BlockCase("plain", coded=False),
    BlockCase("plain, projection", coded=False, in_channels=16),
    BlockCase("plain, stride 2", coded=False, in_channels=16, stride=2),
    BlockCase("plain, evaluation", coded=False, train=False),
)


def step_of(
    case: BlockCase, block: CodedBottleneck, backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output, energies, coding loss, every gradient and buffer after a step of a copy."""
    block = copy.deepcopy(block).to(dtype)
    block.backend = backend  # type: ignore[assignment]
    inputs = case.inputs()
    x = inputs["x"].to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    masks = {k: v.to(dtype) for k, v in inputs.items() if k.endswith("_mask")}
    y, energies = map_and_energies(block, x, **masks)
    total = (y * inputs["grad"].to(dtype)).sum()
    actual = {"output": y}
    if block.codebook is not None and energies is not None:
        loss = CodedLoss([block.codebook], weight=6.0)
        coding = loss(torch.zeros(BATCH, 10, dtype=dtype), [energies], inputs["targets"])
        total = total + coding.total
        actual |= {"energies": energies, "coding loss": coding.total}
    total.backward()
    assert x.grad is not None
    actual["gradient of x"] = x.grad
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        actual[f"gradient of {name}"] = parameter.grad
    actual |= {f"buffer {k}": v for k, v in block.named_buffers() if k != "codewords"}
    return {name: value.detach().clone() for name, value in actual.items()}
