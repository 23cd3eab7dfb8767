"""Networks in the fused data flow: the same numbers, less memory, one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from support.cases.fused import CASES
from support.small_networks import make_images, make_network
from torch import Tensor, nn

from coded_resnext import CodedLoss, CodedResNeXt, create_model

TARGETS = torch.tensor([0, 1, 2, 3])


def step(model: CodedResNeXt, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A training step: loss, gradients, buffers."""
    torch.manual_seed(1)
    model.to(dtype).train()
    loss = CodedLoss(model.codebooks, weight=4.0)
    logits, energies = model(make_images(4, seed=2).to(dtype), return_energies=True)
    total = loss(logits, energies, TARGETS).total
    total.backward()
    actual = {"loss": total.detach(), "logits": logits.detach()}
    actual |= {f"energies {i}": e.detach() for i, e in enumerate(energies)}
    actual |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return actual | {name: b.clone() for name, b in model.named_buffers() if b.dtype != torch.bool}


def network(backend: str, **arguments: object) -> CodedResNeXt:
    """The small network in float64, where no kernel has to be interpreted."""
    model = make_network(**arguments).double()
    for block in model.blocks:
        block.backend = backend  # type: ignore[assignment]
    return model


def pair(**arguments: object) -> tuple[CodedResNeXt, CodedResNeXt]:
    """A network in the fused data flow and the same layer by layer."""
    return network("fused", **arguments), network("reference", **arguments)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


def frozen(model: CodedResNeXt) -> CodedResNeXt:
    """BatchNorms of the middle stages in evaluation, as when a network is fine-tuned."""

    def train(mode: bool = True) -> CodedResNeXt:
        nn.Module.train(model, mode)
        for stage in model.stages[1:3]:
            for module in stage.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return model

    model.train = train  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("change", [lambda model: model, frozen], ids=["training", "frozen"])
def test_a_step_is_that_of_the_network_layer_by_layer(
    change: Callable[[CodedResNeXt], CodedResNeXt],
) -> None:
    fused, plain = pair(drop_branches=0.2)
    assert_same(step(change(fused)), step(change(plain)), 1e-11)


def test_evaluation_maps_and_removal() -> None:
    fused, plain = pair()
    x = make_images(3, seed=5).double()
    outcomes = []
    for model in (fused, plain):
        with torch.no_grad():
            last, energies = model.features(x, torch.tensor([3, 0, 1]))
            maps = [step.map for step in model.walk(x, torch.tensor([3, 0, 1]))]
            assert torch.equal(maps[-1], last)
            outcomes.append([last, *energies, *maps, model(x, keep=2)])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def test_autocast_rounds_what_it_rounds_layer_by_layer() -> None:
    """Energies and statistics stay float32, maps become bfloat16: as far from float64 as before."""
    x = make_images(4, seed=3)
    outcomes = []
    for backend in ("fused", "torch"):
        model = network(backend).float().train()
        exact = network("torch").train()(x.double(), return_energies=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, energies = model(x, return_energies=True)
        assert all(e.dtype == torch.float32 for e in energies)
        logits.float().sum().backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in grads)
        pairs = zip([logits, *energies], [exact[0], *exact[1]], strict=True)
        outcomes.append([largest(a.double() - b) / largest(b) for a, b in pairs])
    for actual, expected in zip(*outcomes, strict=True):
        assert actual < 2 * expected + 1e-3


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_whole(training: bool) -> None:
    copies = [network("fused", drop_branches=0.0) for _ in range(2)]
    x = make_images(4, seed=2).double()
    outcomes = []
    for model, compiled in zip(copies, (True, False), strict=True):
        model.train(training)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        y, energies = call(x, return_energies=True)
        (y.square().sum() + sum(e.pow(3).sum() for e in energies)).backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None for g in grads)
        outcomes.append([y, *energies, *grads, *model.buffers()])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that a forward pass keeps for the backward pass.

    The parameters, and the input itself, are there anyway.
    """
    there = {p.untyped_storage().data_ptr() for p in block.parameters()}
    there.add(x.untyped_storage().data_ptr())
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in there:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        block(x)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


@pytest.mark.parametrize("name", ["plain", "coded"])
def test_a_block_keeps_its_raw_tensors_alone(name: str) -> None:
    """x, y1, y2 and, in a coded block, h' and y3, in the storage type; all else is small."""
    case = next(case for case in CASES if case.name == name)
    block = case.make()
    x = torch.randn(16, 24, 12, 12, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    x.requires_grad_()
    wide, narrow = x.nbytes, x.nbytes // 24 * block.reduce.out_channels
    # The output is kept for the next block; x is there anyway.
    raw = 3 * narrow + wide if case.coded else 2 * narrow
    tensors = raw + wide
    block.backend = "fused"
    actual = kept_bytes(block, x)
    assert tensors <= actual < 1.01 * tensors
    # Layer by layer what stands behind the two ReLUs is kept too, and what they are applied to.
    block.backend = "torch"
    layered = (5 if case.coded else 4) * narrow + 2 * wide
    assert kept_bytes(block, x) >= layered


def test_what_cannot_be_fused_runs_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    x = make_images(2, seed=0).double()
    changes: dict[str, Callable[[CodedResNeXt], object]] = {
        "a hook on": lambda m: m.blocks[1].expand.register_forward_hook(lambda *_: None),
        "GroupNorm stands in": lambda m: setattr(
            m.blocks[0], "reduce_bn", nn.GroupNorm(1, 10).double()
        ),
        "on the gradient": lambda m: m.blocks[2].register_full_backward_hook(lambda *_: None),
    }
    for reason, change in changes.items():
        fused, plain = pair()
        change(fused)
        change(plain)
        with caplog.at_level(logging.INFO, "coded_resnext"):
            actual = fused(x)
        torch.testing.assert_close(actual, plain(x), rtol=1e-11, atol=1e-11)
        assert reason in caplog.text
    ablation = network("fused", normalize=False)
    with caplog.at_level(logging.INFO, "coded_resnext"):
        actual = ablation(x)
    expected = network("torch", normalize=False)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert "energies are not normalised" in caplog.text


def test_state_and_backend_go_through_the_registry() -> None:
    """One set of parameters: a state dict of one data flow is one of the other."""
    fused = create_model("coded_resnext_digits", backend="fused").double()
    plain = create_model("coded_resnext_digits", backend="torch").double()
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_maps_of_another_dtype_are_refused_as_by_the_layers(training: bool) -> None:
    """Nothing is cast without a word where autocast is off."""
    block = CASES[0].make().float().train(training)
    block.backend = "fused"
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="type"):
        block(torch.rand(2, 24, 5, 5).bfloat16())
