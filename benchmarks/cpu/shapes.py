"""The distinct coded blocks of the paper's networks, at the sizes that training gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext import Codebook, CodedBottleneck, CodedLoss, create_model
from coded_resnext.models.block import EnergyRecord

# Image size and batch of each network.
SETTINGS = {
    "coded_resnext29_10x11d": (32, 64),
    "coded_resnext29_20x6d": (32, 64),
    "coded_resnext50_32x4d": (160, 32),
}
VARIANTS = ("plain", "coded", "reference")


@dataclass(frozen=True)
class BlockShape:
    """One block and its input."""

    network: str
    stage: str
    batch: int
    in_channels: int
    size: int
    channels: int
    width: int
    branches: int
    active: int
    stride: int
    classes: int

    @property
    def name(self) -> str:
        """Network, stage and whether the block is the stage's first: `20x6d c3 stride 2`."""
        return f"{self.network.split('_')[-1]} {self.stage} stride {self.stride}"

    def make_step(self, variant: str, memory_format: torch.memory_format) -> TrainingStep:
        """A training step of the block: `plain`, `coded`, or coded by the `reference`."""
        return TrainingStep(self, variant, memory_format)


class TrainingStep:
    """Forward and backward pass of one block on fixed random input."""

    def __init__(self, shape: BlockShape, variant: str, memory_format: torch.memory_format) -> None:
        torch.manual_seed(0)
        book = Codebook.shipped(shape.classes, shape.branches, shape.active)
        self.block = CodedBottleneck(
            shape.in_channels,
            shape.channels,
            shape.width,
            shape.branches,
            None if variant == "plain" else book,
            stride=shape.stride,
            drop_branches=0.1,
            backend="reference" if variant == "reference" else "torch",
        ).to(memory_format=memory_format)
        # At its initial value, zero, this scale would leave nothing to do for the backward pass.
        torch.nn.init.ones_(self.block.expand_bn.weight)
        self.loss = None if variant == "plain" else CodedLoss([book])
        self.targets = torch.randint(shape.classes, (shape.batch,))
        self.logits = torch.zeros(shape.batch, shape.classes)
        x = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size)
        self.x = x.to(memory_format=memory_format).requires_grad_()
        out = -(-shape.size // shape.stride)
        grad = torch.randn(shape.batch, shape.channels, out, out)
        self.grad = grad.to(memory_format=memory_format)

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """One step; gradients are made anew, as after `zero_grad(set_to_none=True)`."""
        self.block.zero_grad(set_to_none=True)
        self.x.grad = None
        record = EnergyRecord()
        y = self.block(self.x, record=record)
        energies = record.energies
        if self.loss is None or energies is None:
            y.backward(self.grad)
        else:
            coding = self.loss(self.logits, [energies], self.targets).total
            torch.autograd.backward((y, coding), (self.grad, None))
        return y.detach(), energies


def block_shapes() -> Iterator[BlockShape]:
    """Every distinct coded block of the three networks."""
    for network, (image, batch) in SETTINGS.items():
        model = create_model(network)
        # The ImageNet stem and pooling divide the size by 4.
        size = image if model.config["stem"] == "conv3x3" else image // 4
        seen = set()
        for number, stage in enumerate(model.stages, 2):
            for block in stage:
                assert isinstance(block, CodedBottleneck)
                if block.codebook is not None:
                    shape = BlockShape(
                        network=network,
                        stage=f"c{number}",
                        batch=batch,
                        in_channels=block.in_channels,
                        size=size,
                        channels=block.expand.out_channels,
                        width=block.width,
                        branches=block.branches,
                        active=block.codebook.active,
                        stride=block.stride,
                        classes=model.num_classes,
                    )
                    if shape not in seen:
                        seen.add(shape)
                        yield shape
                size = -(-size // block.stride)
