"""One training step of every coded block of the paper's networks, on the CPU.

Side by side and interleaved, so that the machine's mood falls on all alike: the plain block, the
coded block by the Gram form, and the coded block by the unfused definition. Medians; memory that a
step adds in a process of its own. The outputs of the two coded forms are compared first.

    python -m pytest benchmarks/cpu/bench_block.py --benchmark-only \
        --results benchmarks/results/cpu_block_step.json
    python benchmarks/render.py benchmarks/results/cpu_block_step.json
    python benchmarks/cpu/bench_block.py "32x4d c4 stride 1" coded    # MiB that a step adds; Linux
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
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
ROUNDS = 15
# The definition takes seconds; its share of the noise is small.
REFERENCE_ROUNDS = 3
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


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
        """Returns network, stage and whether the block is the stage's first: `20x6d c3 stride
        2`."""
        return f"{self.network.split('_')[-1]} {self.stage} stride {self.stride}"

    def make_step(self, variant: str, memory_format: torch.memory_format) -> TrainingStep:
        """Returns a training step of the block: `plain`, `coded`, or coded by the `reference`."""
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
    """Yields every distinct coded block of the three networks."""
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


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", list(block_shapes()), ids=lambda shape: shape.name)
def test_training_step(
    shape: BlockShape, layout: str, benchmark: Any, record: Callable[[dict[str, Any]], None]
) -> None:
    variants = VARIANTS if layout == "nchw" else ("plain", "coded")
    steps = {name: shape.make_step(name, FORMATS[layout]) for name in variants}
    if "reference" in steps:
        check_equal(steps["coded"], steps["reference"])
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def one_round() -> None:
        for name, step in steps.items():
            if name != "reference" or len(seconds[name]) < REFERENCE_ROUNDS:
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    # The first step of each allocates and compiles; it is not counted.
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    row: dict[str, Any] = {
        "block": shape.name,
        "layout": layout,
        **{f"{name}_ms": round(1000 * value, 2) for name, value in median.items()},
        "coded_over_plain": round(median["coded"] / median["plain"], 3),
    }
    if "reference" in median:
        row["reference_over_coded"] = round(median["reference"] / median["coded"], 2)
        for name in variants:
            row[f"{name}_step_mib"] = step_memory(shape.name, name)
    benchmark.extra_info.update(row)
    record(row)


def check_equal(coded: Any, reference: Any) -> None:
    """Same outputs from both forms, to float32 rounding, before anything is timed."""
    for step in (coded, reference):
        torch.manual_seed(1)
        step.outputs = step()
    for actual, expected in zip(coded.outputs, reference.outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def step_memory(name: str, variant: str) -> float:
    """Returns the memory that a step adds, MiB, measured in a process of its own."""
    command = [sys.executable, __file__, name, variant]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(output.stdout)


def added_mib(work: Callable[[], object]) -> float:
    """Returns the memory that a call adds to the process at its peak, MiB; on Linux."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        match = re.search(rf"{field}:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1])

    # Resets the highest value to the present one.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 1024


def main() -> None:
    """Prints the memory that one step adds: in a process in which nothing else has used any."""
    shapes = {shape.name: shape for shape in block_shapes()}
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "shape", choices=shapes, metavar="SHAPE", help="such as '32x4d c4 stride 1'"
    )
    parser.add_argument("variant", choices=VARIANTS, help="the block")
    args = parser.parse_args()
    shape, variant = shapes[args.shape], args.variant
    # A small step first: it loads the libraries that the first convolution loads.
    replace(shape, batch=1).make_step(variant, torch.contiguous_format)()
    step = shape.make_step(variant, torch.contiguous_format)
    print(f"{added_mib(step):.0f}")


if __name__ == "__main__":
    main()
