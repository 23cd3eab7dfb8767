"""Hooks, transforms and other people's tools on a network as it is; docs/tools.md says how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import relative_error
from support.small_networks import NARROW, WIDE, make_network
from torch import Tensor, fx
from torch.fx.experimental import optimization

from coded_resnext import (
    CodedBottleneck,
    CodedResNeXt,
    Stage,
    extract_classifier,
    use_grouped_kernels,
)
from coded_resnext.kernels import Aggregation, Backend
from coded_resnext.models.block import EnergyRecord

# In float64, where every backend runs on PyTorch's operations.
IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


DOC = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)


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


@pytest.mark.long
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


def test_folding_in_a_symbolic_trace_leaves_the_energies() -> None:
    """The BatchNorm behind `expand` went into the weight that the energies are taken of."""
    model = network()
    assert relative_error(optimization.fuse(model)(IMAGES), model(IMAGES)) < 1e-12


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


@pytest.mark.parametrize(("coded", "training"), [(True, True), (True, False), (False, False)])
def test_maps_of_classes_with_captum_and_grad_cam(coded: bool, training: bool) -> None:
    """captum#365, pytorch-grad-cam#87: Grad-CAM of a block is what its definition gives."""
    captum = pytest.importorskip("captum.attr")
    cams = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = network(drop_branches=0.0).train(training)
    block = model.blocks[1 if coded else 0]
    maps: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, inputs, y: maps.append(y))
    logits = model(IMAGES)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), maps)
    expected = (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True)
    heat = captum.LayerGradCam(model, block).attribute(IMAGES, target=2)
    assert relative_error(heat, expected) < 1e-12
    if training:  # The other library puts a network into evaluation mode.
        return
    with cams.GradCAM(model=model, target_layers=[block]) as cam:
        shown = torch.from_numpy(cam(IMAGES, [targets.ClassifierOutputTarget(2)] * len(IMAGES)))
    shares = expected[:, 0].relu()
    shares = shares - shares.amin((1, 2), keepdim=True)
    shares = shares / shares.amax((1, 2), keepdim=True).clamp_min(1e-7)
    # The library computes in float32, and adds 1e-7 to what it divides by.
    assert relative_error(shown.double(), shares) < 1e-4


def test_conductance_of_expand_and_energies_with_captum() -> None:
    """captum#410, pytorch#15716: the weight was read, and no hook of the layer saw that.

    What the conductances of all energies of a block add up to is the change of the objective.
    """
    captum = pytest.importorskip("captum.attr")
    model = network()
    block = model.coded_blocks[0]
    through = captum.LayerConductance(model, block.expand).attribute(IMAGES, target=1, n_steps=4)
    assert through.shape == (5, 12, 6, 6)
    assert bool(through.abs().amax((1, 2, 3)).gt(0).all())

    def score(images: Tensor) -> Tensor:
        return model(images, return_energies=True)[1][0].square().sum(1)

    parts = captum.LayerConductance(score, block.energies).attribute(IMAGES, n_steps=200)
    change = score(IMAGES) - score(torch.zeros_like(IMAGES))
    # A sum over 200 steps of the path.
    assert relative_error(parts.sum(1), change) < 0.02


def test_products_are_counted_with_fvcore_and_torchinfo() -> None:
    """fvcore#62, thop#128: a layer was not called, a trace had one opaque operation of a block."""
    analysis = pytest.importorskip("fvcore.nn")
    torchinfo = pytest.importorskip("torchinfo")
    model, image = network().float(), IMAGES[:1].float()
    counts = analysis.FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    by_name = counts.by_module_and_operator()
    for name, block in model.named_modules():
        if isinstance(block, CodedBottleneck):
            pixels = 36 if block.channels == 12 else 9
            expand = block.branches * block.width * block.channels * pixels
            assert by_name[f"{name}.expand"] == {"conv": expand}
            if block.is_coded:
                grams = block.branches * block.width**2 * (pixels + block.channels)
                assert by_name[name]["bmm"] == grams
    summary = torchinfo.summary(model, input_data=image, verbose=0)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    assert summary.total_mult_adds >= by_name[""]["conv"] + by_name[""]["linear"]


@pytest.mark.parametrize("coded", [True, False])
def test_products_with_the_hessian_are_finite_differences(coded: bool) -> None:
    """pytorch#47562: forward over reverse, and reverse over reverse, of a whole block."""
    model = network()
    block = next(block for block in model.blocks[1:] if block.is_coded == coded)
    names = [name for name, _ in block.named_parameters()]
    values = tuple(p.detach() for p in block.parameters())
    generator = torch.Generator().manual_seed(2)
    vector = tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)
    x = torch.randn(3, block.in_channels, 5, 5, generator=generator, dtype=torch.float64)

    def objective(*values: Tensor) -> Tensor:
        record = EnergyRecord()
        given = dict(zip(names, values, strict=True))
        y = torch.func.functional_call(block, given, (x,), {"record": record})
        coding = 0.0 if record.energies is None else record.energies.pow(3).mean()
        return y.square().mean() + coding

    gradient = torch.func.grad(objective, tuple(range(len(values))))
    _, products = torch.func.jvp(gradient, values, vector)
    leaves = [v.clone().requires_grad_() for v in values]
    first = torch.autograd.grad(objective(*leaves), leaves, create_graph=True)
    twice = torch.autograd.grad(first, leaves, vector)
    step = 1e-6
    ahead = gradient(*(v + step * d for v, d in zip(values, vector, strict=True)))
    behind = gradient(*(v - step * d for v, d in zip(values, vector, strict=True)))
    for one, other, up, down in zip(products, twice, ahead, behind, strict=True):
        assert relative_error(one, other) < 1e-10
        # Differences of rounded values over a small step.
        assert relative_error(one, (up - down) / (2 * step)) < 1e-6


def test_gradients_of_single_samples_by_vmap() -> None:
    """The function vmap over grad of a network gives what one sample at a time gives."""
    model = network()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def objective(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        given = {"return_energies": True}
        logits, energies = torch.func.functional_call(model, parameters, (image[None],), given)
        return logits.square().sum() + sum(value.pow(3).sum() for value in energies)

    at_once = torch.func.vmap(torch.func.grad(objective), (None, 0))(parameters, IMAGES)
    for index, image in enumerate(IMAGES):
        model.zero_grad()
        objective(dict(model.named_parameters()), image).backward()
        for name, parameter in model.named_parameters():
            assert relative_error(at_once[name][index], parameter.grad) < 1e-10


def test_jacobians_forward_and_backward_agree() -> None:
    """pytorch#47562's kind: of logits and energies by the image, in float64."""
    model = network()

    def outputs(image: Tensor) -> Tensor:
        logits, energies = model(image[None], return_energies=True)
        return torch.cat([logits[0], *(value[0] for value in energies)])

    backward = torch.func.jacrev(outputs)(IMAGES[0])
    assert backward[:, 0].any()
    assert relative_error(torch.func.jacfwd(outputs)(IMAGES[0]), backward) < 1e-10
    by_rows = torch.autograd.functional.jacobian(outputs, IMAGES[0])
    assert relative_error(by_rows, backward) < 1e-10


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("code", CODE)
def test_code_of_the_documentation(code: str) -> None:
    for library in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        pytest.importorskip(library)
    exec(compile(code, "docs/tools.md", "exec"), {"__name__": "documentation"})  # noqa: S102
