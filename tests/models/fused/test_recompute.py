"""Plain blocks whose last convolution is not written: which they are, and what they do."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases.fused import CASES, BlockCase
from torch import Tensor, nn

from coded_resnext import CodedBottleneck
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.rows import Passes
from coded_resnext.models.fused.block import RECOMPUTED, fused_block, recomputes
from coded_resnext.models.fused.step import Deferred, ready

PLAIN = next(case for case in CASES if case.name == "plain")


def recomputed(block: CodedBottleneck, x: Tensor) -> bool:
    """Whether the block leaves its last convolution to be computed."""
    block.backend = "fused"
    y, _ = fused_block(block, x, drop_mask=None, keep_mask=None)
    return isinstance(y, Deferred) and y.sum.main.weight is not None


def image(case: BlockCase = PLAIN, **to: torch.dtype) -> Tensor:
    x = case.inputs()["x"].to(**to) if to else case.inputs()["x"].double()
    return x.contiguous(memory_format=torch.channels_last)


def test_plain_blocks_are() -> None:
    for case in CASES:
        assert recomputed(case.make(), image(case)) == (not case.coded), case.name


@pytest.mark.parametrize("frozen", [["expand_bn"], ["skip.1"], ["expand_bn", "skip.1"]])
def test_frozen_layers_have_no_statistics_to_take(frozen: list[str]) -> None:
    case = next(case for case in CASES if case.name == "plain, projection")
    outcomes = []
    for backend in ("fused", "reference"):
        block = case.make()
        block.backend = backend  # type: ignore[assignment]
        for name in frozen:
            block.get_submodule(name).eval()
        x = image(case).requires_grad_()
        y = block(x)
        y.square().sum().backward()
        outcomes.append([y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "expected"), [(RECOMPUTED, True), (RECOMPUTED + 8, False)])
def test_blocks_with_many_channels_are_not(channels: int, expected: bool) -> None:
    block = CodedBottleneck(8, 8, channels // 8, 8, None)
    assert recomputed(block, torch.rand(2, 8, 2, 2)) == expected


def test_devices_without_float64_write_it() -> None:
    assert recomputes(PLAIN.make(), "cuda")
    assert not recomputes(PLAIN.make(), "mps")


def test_without_gradients_statistics_are_followed() -> None:
    """As when BatchNorm's running statistics are taken anew over a data set."""
    fused, plain = PLAIN.make(), PLAIN.make()
    fused.backend = "fused"
    with torch.no_grad():
        for _ in range(2):
            actual, expected = fused(image()), plain(image())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["expand.weight", "expand_bn.weight", "expand_bn.bias", "grouped_bn.weight"]
)
def test_a_frozen_parameter_gets_no_gradient_and_the_others_theirs(name: str) -> None:
    blocks = [PLAIN.make() for _ in range(2)]
    blocks[0].backend = "fused"
    for block in blocks:
        block.get_parameter(name).requires_grad_(False)
        block(image()).square().sum().backward()
    for (which, a), b in zip(blocks[0].named_parameters(), blocks[1].parameters(), strict=True):
        if which == name:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dead", ["expand.weight", "grouped_bn.weight"])
def test_constant_channels_come_out_as_their_bias(dead: str) -> None:
    """Their variance is 0, and rounding must not make it less."""
    outputs = []
    for backend, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        block = PLAIN.make().to(dtype)
        block.backend = backend  # type: ignore[assignment]
        nn.init.zeros_(block.get_parameter(dead)[3:])
        outputs.append(block(image(dtype=dtype)))
        outputs[-1].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c.train], ids=lambda c: c.name)
def test_a_block_of_every_kind_behind_one(case: BlockCase) -> None:
    """The first convolution of a block computes the last one of the block before."""
    before = CodedBottleneck(24, case.in_channels, 2, 8, None).double()
    if case.in_channels != 24:
        assert isinstance(before.skip, nn.Sequential)
    blocks = [before, case.make()]
    masks = {k: v.double() for k, v in case.inputs().items() if k.endswith("_mask")}
    masks = {"drop_mask": None, "keep_mask": None} | masks
    outcomes = []
    for backend in ("fused", "reference"):
        copies = [copy.deepcopy(block) for block in blocks]
        for block in copies:
            block.backend = backend  # type: ignore[assignment]
        leaf = image().requires_grad_()
        if backend == "fused":
            x, _ = fused_block(copies[0], leaf, drop_mask=None, keep_mask=None)
            assert isinstance(x, Deferred)
            assert x.sum.main.weight is not None
            x, _ = fused_block(copies[1], x, **masks)
            y = ready(x)
        else:
            y = copies[1](copies[0](leaf), **masks)
        (y.square().sum()).backward()
        grads = [p.grad for block in copies for p in block.parameters()]
        buffers = [b.double() for block in copies for b in block.buffers()]
        outcomes.append([y, leaf.grad, *grads, *buffers])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_kernels_that_run_a_pass_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of the product go with it to where it is computed."""
    monkeypatch.setattr(convolution, "select_products", lambda *_a, **_k: Passes(weight=True))
    block = PLAIN.make()
    block.backend = "fused"
    y, _ = fused_block(block, image(), drop_mask=None, keep_mask=None)
    assert isinstance(y, Deferred)
    assert y.sum.main.passes == Passes(weight=True)
