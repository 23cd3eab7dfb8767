"""Hooks, transforms and other people's tools on a network as it is; docs/tools.md says how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import relative_error
from support.small_networks import make_network
from torch import Tensor

from coded_resnext import CodedBottleneck

IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["torch", "reference", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_and_energies_are_layers_that_can_be_hooked(backend: str, training: bool) -> None:
    """captum#365, pytorch-grad-cam#87: the layer's output was a tuple.

    Energies are hooked on every way; with a hook on a block it runs layer by layer.
    """
    model = make_network(backend=backend, drop_branches=0.0).train(training)
    seen: dict[str, Tensor] = {}

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        seen[names[module]] = output

    names = {module: name for name, module in model.named_modules()}
    for block in model.coded_blocks:
        block.energies.register_forward_hook(keep)
    _, energies = model(IMAGES, return_energies=True)
    assert len(seen) == len(energies) == 3
    for one, hooked in zip(energies, seen.values(), strict=True):
        assert hooked is one
    for block in model.blocks:
        block.register_forward_hook(keep)
    logits, _ = model(IMAGES, return_energies=True)
    maps = [seen[names[block]] for block in model.blocks]
    assert [list(y.shape[:2]) for y in maps] == [[5, block.channels] for block in model.blocks]
    assert relative_error(model.head(maps[-1].mean((2, 3))), logits) < 1e-5


def test_a_hook_replaces_energies() -> None:
    model = make_network()
    model.coded_blocks[1].energies.register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    _, energies = model(IMAGES, return_energies=True)
    assert [bool(value.any()) for value in energies] == [True, False, True]


def test_a_compiled_block_hands_its_energies_over() -> None:
    """Blocks are compiled one by one, as large networks are; each is one graph."""
    model = make_network()
    expected = model(IMAGES, return_energies=True)
    for block in model.blocks:
        assert isinstance(block, CodedBottleneck)
        block.compile(backend="eager", fullgraph=True)
    logits, energies = model(IMAGES, return_energies=True)
    assert relative_error(logits, expected[0]) < 1e-5
    for one, other in zip(energies, expected[1], strict=True):
        assert relative_error(one, other) < 1e-5
