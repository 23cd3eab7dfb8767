"""The count of a network's memory traffic, against the tensors that its operators take and give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from model_bytes import least_bytes, maps_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coded_resnext import CodedResNeXt, Stage

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
        found = func(*args, **(kwargs or {}))
        if func.namespace == "coded_resnext":
            for value in tree_leaves((args, found)):
                if isinstance(value, Tensor) and value.ndim == 4 and len(value) == BATCH:
                    self.elements[func.overloadpacket.__name__] += value.numel()
        return found


def network(stages: list[Stage]) -> CodedResNeXt:
    torch.manual_seed(0)
    return CodedResNeXt(stages, 10, stem_channels=16, drop_branches=0.0, backend="fused").double()


def images() -> Tensor:
    return torch.rand(BATCH, 3, SIZE, SIZE, dtype=torch.float64)


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


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_it_counts_what_training_calls_operators_with(stages: list[Stage]) -> None:
    model, moved = network(stages), Moved()
    with moved:
        logits, energies = model(images(), return_energies=True)
        (logits.square().sum() + sum(e.pow(2).sum() for e in energies)).backward()
    expected: Counter[str] = Counter()
    for maps in maps_of(model, BATCH, SIZE):
        for name, elements in (maps.forward() | maps.backward()).items():
            expected[name.removeprefix("skip ")] += elements
    # The first block's input is there already; the last block's output is written by itself.
    first = maps_of(model, BATCH, SIZE)[0]
    for suffix, elements in (("", first.x + first.y1), ("_backward", 2 * first.x + 2 * first.y1)):
        expected[f"join_conv1x1{suffix}"] -= elements
        expected[f"conv1x1{suffix}"] += elements
    last = maps_of(model, BATCH, SIZE)[-1]
    expected |= {"join": 3 * last.y3, "join_backward": 4 * last.y3}
    assert moved.elements == expected
    total = least_bytes(model, BATCH, SIZE, 2, training=True)
    assert total == 2 * sum(moved.elements.values())
