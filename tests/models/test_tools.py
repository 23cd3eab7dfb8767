"""Hooks, transforms and other people's tools on a network as it is; docs/tools.md says how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import relative_error
from support.small_networks import NARROW, WIDE, make_network
from torch import Tensor, fx

from coded_resnext import (
    CodedBottleneck,
    CodedResNeXt,
    Stage,
    extract_classifier,
    use_grouped_kernels,
)
from coded_resnext.kernels import Aggregation, Backend

# In float64, where every backend runs on PyTorch's operations.
IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(backend: Backend = "auto", **arguments: Any) -> CodedResNeXt:
    model = make_network(**arguments).double()
    for block in model.blocks:
        block.backend = backend
    return model


@pytest.mark.parametrize(
    ("backend", "training"),
    [("torch", True), ("torch", False), ("reference", True), ("fused", False), ("fused", True)],
)
def test_blocks_and_energies_are_layers_that_can_be_hooked(backend: str, training: bool) -> None:
    """captum#365, pytorch-grad-cam#87: the layer's output was a tuple.

    Energies are hooked on every way; with a hook on a block it runs layer by layer.
    """
    model = network(backend, drop_branches=0.0).train(training)
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
    assert relative_error(model.head(maps[-1].mean((2, 3))), logits) < 1e-12


def test_a_hook_replaces_energies() -> None:
    model = network()
    model.coded_blocks[1].energies.register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    _, energies = model(IMAGES, return_energies=True)
    assert [bool(value.any()) for value in energies] == [True, False, True]


def test_a_compiled_block_hands_its_energies_over() -> None:
    """Large networks are compiled block by block; each is one graph."""
    model = network()
    expected = model(IMAGES, return_energies=True)
    for block in model.blocks[:2]:
        assert isinstance(block, CodedBottleneck)
        block.compile(backend="eager", fullgraph=True)
    logits, energies = model(IMAGES, return_energies=True)
    assert relative_error(logits, expected[0]) < 1e-12
    for one, other in zip(energies, expected[1], strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "reference", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_a_symbolic_trace_computes_the_same(backend: str, training: bool) -> None:
    """vision#3597, fx of timm: asking for a shape was control flow.

    A trace takes any number of images of any size, draws masks of its own, and is fixed to the
    options that it was traced with.
    """
    model = network(backend, drop_branches=0.4).train(training)
    use_grouped_kernels(model)
    expected = network(drop_branches=0.4).train(training)
    logits = fx.symbolic_trace(model)
    options = {"return_energies": True, "keep": 2}
    both = fx.symbolic_trace(model, concrete_args=options)
    for images in (IMAGES, torch.randn(2, 1, 9, 7).double()):
        outcomes = []
        for call in (expected, logits):
            torch.manual_seed(5)
            outcomes.append(call(images))
        assert relative_error(*outcomes) < 1e-12
        outcomes = []
        for call in (lambda x: expected(x, **options), lambda x: both(x, *options.values())):
            torch.manual_seed(5)
            outcomes.append(call(images))
        assert relative_error(outcomes[0][0], outcomes[1][0]) < 1e-12
        for one, other in zip(outcomes[0][1], outcomes[1][1], strict=True):
            assert relative_error(one, other) < 1e-12
    with pytest.raises(ValueError, match="keep: expected None, as the network was traced"):
        logits(IMAGES, keep=1)
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, H, W\]"):
        logits(torch.randn(2, 3, 6, 6).double())


def test_a_cut_out_network_is_traced_symbolically() -> None:
    part = extract_classifier(network(), 1)
    assert relative_error(fx.symbolic_trace(part)(IMAGES), part(IMAGES)) < 1e-12


def test_features_by_name_with_torchvision() -> None:
    """vision#4302."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = network()
    names = {"stages.1": "map", "stages.1.1.energies": "energies", "head": "logits"}
    features = extraction.create_feature_extractor(model, names)(IMAGES)
    steps = list(model.walk(IMAGES))
    expected = {"map": steps[2].map, "energies": steps[2].energies, "logits": model(IMAGES)}
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(features[name], value) < 1e-12


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("aggregation", ["sum", "concat"])
def test_gradients_of_single_samples_with_opacus(aggregation: Aggregation) -> None:
    """opacus#5, opacus#417: a ReLU in place; a weight that is used outside of its layer's call."""
    opacus = pytest.importorskip("opacus")
    validator = pytest.importorskip("opacus.validators").ModuleValidator
    made = CodedResNeXt(
        [Stage(1, 15, 2, 5, 3, stride=2), Stage(1, 8, 2, 4, 2)],
        4,
        codebooks=[WIDE, NARROW],
        stem_channels=8,
        in_channels=1,
        drop_branches=0.0,
        aggregation=aggregation,
    )
    # BatchNorm has no gradients of single samples; this makes it GroupNorm.
    model: Any = validator.fix(made).double()

    def objective(images: Tensor, call: Any) -> Tensor:
        logits, energies = call(images, return_energies=True)
        return logits.square().sum() + sum(value.pow(3).sum() for value in energies)

    alone = []
    for image in IMAGES:
        model.zero_grad()
        objective(image[None], model).backward()
        alone.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    watched = opacus.GradSampleModule(model, loss_reduction="sum")
    objective(IMAGES, watched).backward()
    for name, parameter in model.named_parameters():
        for gradient, expected in zip(parameter.grad_sample, alone, strict=True):
            assert relative_error(gradient, expected[name]) < 1e-10, name
