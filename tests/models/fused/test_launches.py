"""What training and evaluation of a fused block launch: the table of docs/fused_block.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.helpers import needs_triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from coded_resnext import Codebook, CodedBottleneck
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.rows import ALL_PASSES, LaunchRow, Plan
from coded_resnext.models.block import apply_block
from coded_resnext.models.fused import block as fused_block
from coded_resnext.models.fused.step import Map, ready

TABLE = Path(__file__).parents[3] / "docs" / "fused_block.md"
# What PyTorch hands to cuBLAS and cuDNN.
LIBRARY = {
    *("aten::mm", "aten::addmm", "aten::_addmm_activation"),
    *("aten::convolution", "aten::convolution_backward"),
}
SHAPE = (2, 16, 3, 3)
# A number that no weight has for a side.
PIXELS = 2 * 3 * 3
KINDS = {
    f"{kind}, {skip}": (kind == "coded", outputs)
    for kind in ("plain", "coded")
    for skip, outputs in (("identity", 16), ("projection", 24))
}


def make_blocks(coded: bool, outputs: int, backend: str) -> list[CodedBottleneck]:
    """The block to be counted, behind one that leaves its output to be computed."""
    torch.manual_seed(0)
    book = Codebook.shipped(10, 10, 5) if coded else None
    before = CodedBottleneck(16, 16, 2, 8, None)
    block = CodedBottleneck(16, outputs, 2, 10 if coded else 8, book, drop_branches=0.0)
    for each in (before, block):
        each.backend = backend  # type: ignore[assignment]
    return [before, block]


def counted(blocks: list[CodedBottleneck], launched: list[str]) -> dict[str, Counter[str]]:
    """Kernels and products of the forward and the backward pass; energies have gradients."""
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = {}

    def forward() -> Tensor:
        value: Map = x
        total = torch.zeros(())
        for block in blocks:
            value, energies = apply_block(block, value)
            total = total + (0.0 if energies is None else energies.sum())
        return total + ready(value).square().sum()

    result = torch.zeros(())
    for name in ("forward", "backward"):
        launched.clear()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            if name == "forward":
                result = forward()
            else:
                result.backward()
        actual[name] = Counter(launched) + products_of(record)
    return actual


def products_of(record: profile) -> Counter[str]:
    """Products and convolutions of maps by PyTorch; not those of weights alone."""
    events = [e for e in record.events() if e.name in LIBRARY]
    of_maps = [
        e for e in events if any(PIXELS in shape or len(shape) == 4 for shape in e.input_shapes)
    ]
    return Counter(e.name for e in of_maps)


def evaluated(block: CodedBottleneck, launched: list[str]) -> Counter[str]:
    """Kernels and products of a block in evaluation."""
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    launched.clear()
    kinds = [ProfilerActivity.CPU]
    with torch.no_grad(), profile(activities=kinds, record_shapes=True) as record:
        apply_block(block.eval(), x)
    return Counter(launched) + products_of(record)


def numbers(count: Counter[str]) -> str:
    """Kernels and products, as the table has them."""
    products = sum(n for name, n in count.items() if name in LIBRARY)
    return f"{count.total() - products} + {products}"


def row_of(kind: str) -> list[str]:
    """The cells of a row of the table."""
    (line,) = (
        line
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| {kind} |")
    )
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels in the order of their launches, on what stands in for a GPU.

    There the pointwise kernels stand around PyTorch's products, and kernels have every pass.
    """
    names: list[str] = []
    launch = LaunchRow.launch

    def note(row: LaunchRow, *args: object) -> None:
        names.append(row.kernel.partition(":")[2])
        launch(row, *args)

    monkeypatch.setattr(LaunchRow, "launch", note)
    monkeypatch.setattr(fused_block, "_pointwise", lambda *_: True)
    every = Plan(ALL_PASSES, "all of them")
    monkeypatch.setattr(convolution, "planned", lambda *_: every)
    return names


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_launches_of_a_block(backend: str, launched: list[str]) -> None:
    """A block behind another costs what the two cost without what the other costs."""
    alone = counted(make_blocks(False, 16, backend)[:1], launched)
    for kind, arguments in KINDS.items():
        both = counted(make_blocks(*arguments, backend), launched)
        for name, other in alone.items():
            both[name].subtract(other)
        assert all(n >= 0 for count in both.values() for n in count.values())
        cells = row_of(kind)[:2] if backend == "fused" else row_of(kind)[3:5]
        assert [numbers(count) for count in both.values()] == cells, (kind, both)


@needs_triton
@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_launches_of_evaluation(backend: str, launched: list[str]) -> None:
    for kind, arguments in KINDS.items():
        count = evaluated(make_blocks(*arguments, backend)[1], launched)
        cell = row_of(kind)[2] if backend == "fused" else row_of(kind)[5]
        assert numbers(count) == cell, (kind, count)
