"""Blocks and networks in evaluation without gradients, against the block as it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.cases.fused import CASES, BlockCase
from support.helpers import map_and_energies, needs_triton, relative_error
from support.small_networks import WIDE, make_images, make_network
from torch import Tensor, nn

from coded_resnext import CodedBottleneck, CodedResNeXt, Stage, create_model
from coded_resnext.kernels import layout
from coded_resnext.kernels.build.build import shipped_rows
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.rows import ALL_PASSES, NO_PASSES, LaunchRow, Passes, Plan
from coded_resnext.models.fused import block as fused_block
from coded_resnext.models.fused.norm import fold

EVALUATED = [
    replace(case, train=False, keep=keep)
    for case in CASES
    if case.train and not case.keep
    for keep in ((True, False) if case.coded else (False,))
]
NAMES = [f"{case.name}{', keeping some branches' * case.keep}" for case in EVALUATED]


def evaluated(
    block: CodedBottleneck, case: BlockCase, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """Output and energies of a copy."""
    block = copy.deepcopy(block).to(dtype)
    block.backend = backend  # type: ignore[assignment]
    inputs = case.inputs()
    masks = {"keep_mask": inputs["keep_mask"]} if case.keep else {}
    with (
        torch.no_grad(),
        mock.patch.object(
            fused_block, "inferred_block", wraps=fused_block.inferred_block
        ) as inferred,
    ):
        results = map_and_energies(block, inputs["x"].to(dtype), **masks)
    assert inferred.called == (backend != "reference")
    return [value for value in results if value is not None]


def compare(case: BlockCase, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    block = case.make()
    expected = evaluated(block, case, "reference", torch.float64)
    actual = evaluated(block, case, backend, dtype)
    assert len(actual) == len(expected) == 1 + case.coded
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert relative_error(one.double(), other) < tolerance


@pytest.mark.parametrize("case", EVALUATED, ids=NAMES)
def test_in_float64_it_is_the_block_to_rounding(case: BlockCase) -> None:
    compare(case, "fused", torch.float64, 1e-12)


@needs_triton
@pytest.mark.parametrize("products", [NO_PASSES, ALL_PASSES], ids=["library", "kernels"])
@pytest.mark.parametrize("case", EVALUATED, ids=NAMES)
def test_kernels_in_float32(
    case: BlockCase, products: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "planned", lambda *_: Plan(products, "for this test"))
    compare(case, "triton", torch.float32, 1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"eps": 0.5}, {"affine": False}], ids=["as it is", "epsilon", "no weights"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_folded_convolution_is_the_two_layers(
    settings: dict[str, object], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4, **settings)
    for value in [*bn.parameters(), bn.running_mean, bn.running_var]:
        nn.init.uniform_(value, 0.5, 1.5)
    pair = nn.Sequential(conv, bn).to(dtype).eval()
    x = torch.randn(2, 6, 5, 5).to(dtype)
    with torch.no_grad():
        weight, bias = fold(pair[0], pair[1], None)
        actual = torch.conv2d(x, weight, bias.to(dtype), groups=2)
        expected = copy.deepcopy(pair).double()(x.double())
    assert weight.dtype == dtype
    assert bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(actual.double(), expected) < tolerance
    if dtype == torch.bfloat16:
        # Rounded once, from float32 arithmetic.
        exact = fold(pair[0].double(), pair[1].double(), None).weight
        assert ((weight.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 1.9).all()


def network(backend: str, **arguments: object) -> CodedResNeXt:
    """The small network in float64 and in evaluation, its running statistics those of some data."""
    model = make_network(**arguments).double()
    for block in model.blocks:
        block.backend = backend  # type: ignore[assignment]
    with torch.no_grad():
        for seed in range(3):
            model.train()(make_images(8, seed=seed).double())
    return model.eval()


def outcomes(model: nn.Module, x: Tensor) -> list[Tensor]:
    logits, energies = model(x, return_energies=True)
    return [logits, *energies]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


CHANGES: dict[str, Callable[[CodedResNeXt], object]] = {
    "as it is": lambda _: None,
    "statistics of all processes": nn.SyncBatchNorm.convert_sync_batchnorm,
    "channels-last": lambda model: model.to(memory_format=torch.channels_last),
    "a layer by the batch's statistics": lambda model: model.blocks[1].grouped_bn.train(),
    "a layer without running statistics": lambda model: setattr(
        model.blocks[2], "grouped_bn", nn.BatchNorm2d(10, track_running_stats=False).double()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_network_is_itself_layer_by_layer(change: Callable[[CodedResNeXt], object]) -> None:
    x = make_images(5, seed=9).double()
    actual = []
    for backend in ("fused", "reference"):
        model = network(backend)
        change(model)
        with torch.inference_mode():
            actual.append([*outcomes(model, x), model(x, keep=2)])
    assert_same(*actual, 1e-12)


def test_with_gradients_it_keeps_what_they_need() -> None:
    """The maps of training; the same numbers, and gradients of the inputs."""
    model, x = network("fused"), make_images(3, seed=4).double()
    with torch.no_grad():
        expected = outcomes(model, x)
    assert not expected[0].requires_grad
    actual = outcomes(model, x.requires_grad_())
    assert_same(actual, expected, 1e-12)
    (gradient,) = torch.autograd.grad(actual[0].square().sum(), x)
    plain = outcomes(network("reference"), x)
    (other,) = torch.autograd.grad(plain[0].square().sum(), x)
    torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


def test_autocast_and_half_precision_are_as_near_as_layer_by_layer() -> None:
    x = make_images(6, seed=3)
    exact = outcomes(network("torch"), x.double())
    errors = []
    for backend in ("fused", "torch"):
        model = network(backend).float()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            by_autocast = outcomes(model, x)
        with torch.no_grad():
            whole = outcomes(model.bfloat16(), x.bfloat16())
        for actual in (by_autocast, whole):
            assert all(energies.dtype == torch.float32 for energies in actual[1:])
            errors.append(
                [relative_error(a.double(), b) for a, b in zip(actual, exact, strict=True)]
            )
    for fused, plain in zip(errors[:2], errors[2:], strict=True):
        assert max(fused) < 2 * max(plain) + 1e-3


def test_dead_samples_are_zero() -> None:
    case = next(case for case in EVALUATED if case.name == "coded" and not case.keep)
    block, x = case.make(), case.inputs()["x"].double()
    block.backend = "fused"
    block.grouped_bn.weight.data.zero_()
    block.grouped_bn.bias.data.zero_()
    with torch.no_grad():
        y, energies = map_and_energies(block, x)
        expected = copy.deepcopy(block).requires_grad_(True)(x)
    assert torch.equal(energies, torch.zeros(len(x), 10, dtype=torch.float64))
    torch.testing.assert_close(y, expected)
    assert y.isfinite().all()
    assert y.max() > 0


def test_a_hook_sees_its_layer() -> None:
    model, x = network("fused"), make_images(2, seed=1).double()
    seen: list[Tensor] = []
    model.blocks[1].grouped.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        assert_same(outcomes(model, x), outcomes(network("reference"), x), 1e-12)
    assert len(seen) == 1


@needs_triton
@pytest.mark.parametrize("name", ["coded_resnext50_32x4d", "coded_resnext29_20x6d"])
def test_what_it_launches_is_built_ahead_of_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a whole network on an H200 in bfloat16; nothing is computed here."""
    launched: list[LaunchRow] = []
    monkeypatch.setattr(LaunchRow, "launch", lambda row, *_: launched.append(row))
    monkeypatch.setattr(layout, "architecture_of", lambda _: "sm90")
    model = create_model(name, backend="triton").bfloat16().eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16))
    shipped = {row: name for name, row in shipped_rows("sm90")}
    kinds = {shipped[row].split()[1] for row in launched}
    assert kinds >= {"forward_stride1", "forward_stride2", "pack_weights"}
    # The convolutions of the CIFAR network have the channels of none of the 1x1 kernels.
    assert ("product_join" in kinds) == ("50" in name)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_inductor_compiles_the_fused_blocks(training: bool) -> None:
    """One graph by the default compiler; results, gradients and buffers are those of eager.

    A plain block with a projection before a coded one: what one leaves to the other is in it.
    """
    x = make_images(4, seed=2).double()
    actual: list[list[Tensor]] = []
    for compiled in (False, True):
        torch.manual_seed(0)
        stages = [Stage(1, 12, 2, 5, 5), Stage(1, 12, 2, 5, 3)]
        model = CodedResNeXt(
            stages,
            4,
            codebooks=[WIDE],
            stem_channels=8,
            in_channels=1,
            drop_branches=0.0,
            backend="fused",
        )
        model.double().train(training)
        for block in model.blocks:
            nn.init.uniform_(block.expand_bn.weight, 0.5, 1.5)
        call = torch.compile(model, fullgraph=True, backend="inductor") if compiled else model
        with torch.set_grad_enabled(training):
            values = outcomes(call, x)
        if training:
            total = values[0].square().sum() + sum(e.pow(3).sum() for e in values[1:])
            values += torch.autograd.grad(total, list(model.parameters()))
        actual.append([*values, *model.buffers()])
    assert_same(*actual, 1e-9)
