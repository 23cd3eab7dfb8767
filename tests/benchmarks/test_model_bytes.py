"""The count of a network's memory traffic, against the tensors that operators and kernels take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench_model import least_bytes, maps_of
from support.helpers import needs_triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coded_resnext import CodedResNeXt, Stage
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.rows import ALL_PASSES, LaunchRow, Plan
from coded_resnext.models.fused import block as fused_block

# As many samples as no weight has channels: what tells maps from weights.
BATCH, SIZE = 7, 8
STAGES = {
    "coded and plain, stride 2": [
        Stage(2, 16, 2, 8, 8),
        Stage(3, 24, 2, 10, 5, stride=2),
        Stage(2, 32, 2, 10, 5, stride=2),
    ],
    "plain": [Stage(2, 16, 2, 8, 8), Stage(2, 24, 2, 8, 8, stride=2)],
}


class Moved(TorchDispatchMode):
    """Elements of the maps that every operator of this package takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        actual = func(*args, **(kwargs or {}))
        if func.namespace == "coded_resnext":
            for value in tree_leaves((args, actual)):
                if isinstance(value, Tensor) and value.ndim == 4 and len(value) == BATCH:
                    self.elements[func.overloadpacket.__name__] += value.numel()
        return actual


def network(stages: list[Stage]) -> CodedResNeXt:
    torch.manual_seed(0)
    return CodedResNeXt(stages, 10, stem_channels=16, drop_branches=0.0, backend="fused").double()


def images(size: int = SIZE) -> Tensor:
    return torch.rand(BATCH, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_it_counts_what_evaluation_calls_operators_with(stages: list[Stage]) -> None:
    model, moved = network(stages).eval(), Moved()
    with moved, torch.no_grad():
        model(images())
    expected: Counter[str] = Counter()
    for maps in maps_of(model, BATCH, SIZE):
        for name, elements in maps.evaluation().items():
            expected[name.removeprefix("expand ")] += elements
    # By PyTorch energies are an operator of their own inside that of the convolution.
    del moved.elements["branch_energy"]
    assert moved.elements == expected
    total = least_bytes(model, BATCH, SIZE, 2, training=False)
    assert total == 2 * sum(moved.elements.values())


def counted(name: str, moved: Counter[str]) -> Callable[..., Tensor]:
    """A product by PyTorch, its maps counted."""
    function = getattr(conv1x1_library, name)

    def call(*arguments: Tensor) -> Tensor:
        actual: Tensor = function(*arguments)
        maps = [v for v in (*arguments, actual) if v.ndim == 4 and len(v) == BATCH]
        moved[name] += sum(v.numel() for v in maps)
        return actual

    return call


# Widths that fill the windows of the grouped convolution's kernels; elsewhere those are padded.
FULL = {
    "coded and plain, stride 2": [
        Stage(2, 16, 2, 8, 8),
        Stage(2, 24, 8, 10, 5, stride=2),
    ],
    "plain, the second stage too wide": [Stage(1, 16, 2, 8, 8), Stage(1, 24, 16, 18, 18, stride=2)],
}


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("stages", FULL.values(), ids=FULL)
def test_it_counts_what_training_launches_kernels_with(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: Counter[str] = Counter()
    launch = LaunchRow.launch

    def note(row: LaunchRow, grid: Any, *arguments: Any) -> None:
        for value in arguments:
            if isinstance(value, Tensor) and value.ndim == 4 and len(value) == BATCH:
                moved[row.kernel.partition(":")[2]] += value.numel() * value.is_floating_point()
        launch(row, grid, *arguments)

    monkeypatch.setattr(LaunchRow, "launch", note)
    for name in ("forward", "wide_sums"):
        monkeypatch.setattr(conv1x1_library, name, counted(name, moved))
    monkeypatch.setattr(fused_block, "_pointwise", lambda *_: True)
    every = Plan(ALL_PASSES, "all of them")
    monkeypatch.setattr(convolution, "planned", lambda *_: every)
    model = network(stages).float()
    for block in model.blocks:
        block.backend = "triton"
    logits, energies = model(images(4).float(), return_energies=True)
    (logits.square().sum() + sum(e.pow(2).sum() for e in energies)).backward()
    assert sum(moved.values()) * 2 == least_bytes(model, BATCH, 4, 2, training=True), moved
