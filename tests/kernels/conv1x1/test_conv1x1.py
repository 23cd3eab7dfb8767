"""The 1x1 convolutions by PyTorch: definition, gradients, choice of kernels."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases.conv1x1 import JOIN_ARGUMENTS, ProductCase, called, defined
from support.helpers import relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coded_resnext.kernels import backend, layout
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.conv1x1.rows import ProductSizes, planned
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import ALL_PASSES, NO_PASSES, Passes, Plan

CASES = [
    ProductCase("odd_map", I=8, O=3, H=5, W=3),
    ProductCase("one_pixel", I=8, O=8, B=3, H=1, W=1),
    ProductCase("plain", I=3, O=5, H=2, affine=False, statistics=False),
    ProductCase("affine_alone", I=5, O=2, H=2, statistics=False),
    ProductCase("statistics_alone", I=3, O=4, H=2, affine=False),
    ProductCase("join", I=8, O=4, H=2, W=3, join=True),
    ProductCase("join_identity", I=5, O=4, H=2, W=3, join=True, affine=False, signs=False),
    ProductCase("join_without_statistics", I=8, O=3, H=2, W=2, join=True, statistics=False),
]
WITH_GAIN = [
    ProductCase("gain", I=8, O=6, H=3, gain=True),
    ProductCase("gain_plain", I=8, O=6, H=3, gain=True, affine=False, statistics=False),
]


def test_the_definition_is_that_of_pytorch() -> None:
    inputs = ProductCase("join", I=8, O=3, join=True).inputs(torch.float64)
    y, scale, bias, residual, residual_scale, residual_bias, weight = (
        inputs[name] for name in JOIN_ARGUMENTS
    )

    def mapped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        # Lost beside a variance of one, since no version takes 0.
        return F.batch_norm(x, zero, one, a, b, eps=1e-30)

    expected = F.relu(mapped(y, scale, bias) + mapped(residual, residual_scale, residual_bias))
    assert relative_error(residual_launch.reference(*list(inputs.values())[:-1]), expected) < 1e-14
    expected = F.relu(mapped(y, scale, bias) + residual)
    assert relative_error(residual_launch.reference(y, scale, bias, residual), expected) < 1e-14
    expected = F.conv2d(F.relu(mapped(y, scale, bias)), weight)
    assert relative_error(conv1x1_library.reference(y, weight, scale, bias), expected) < 1e-14


@pytest.mark.parametrize("case", CASES + WITH_GAIN, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_definition(case: ProductCase, dtype: torch.dtype) -> None:
    # Float32 rounds sums; bfloat16 also results, and the gradient that goes into the convolution.
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    inputs = case.inputs(dtype)
    actual, expected = called(case, inputs, NO_PASSES), defined(case, inputs)
    assert set(actual) == set(expected)
    for name in ("x", "y"):
        assert name not in actual or actual[name].dtype == dtype
        assert name not in actual or actual[name].is_contiguous(memory_format=torch.channels_last)
    errors = {name: relative_error(actual[name].double(), expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


def test_signs_are_those_of_the_output() -> None:
    x = torch.randn(2, 24, 3, 5)
    x[0, :9] = 0
    signs = convolution.pack_signs(x)
    assert signs.shape == (2, 3, 5, 3)
    assert signs.dtype == torch.uint8
    # The lowest bit is the first channel.
    bits = (signs[..., None] >> torch.arange(8)) & 1
    assert torch.equal(bits.flatten(3).permute(0, 3, 1, 2) == 1, x > 0)


def test_the_selection_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for inputs, outputs, join, passes in (
        (128, 256, False, ALL_PASSES),
        (256, 512, False, ALL_PASSES),
        (256, 128, True, Passes(forward=True, input=True)),
        (512, 256, True, Passes(forward=True, input=True)),
        (512, 256, False, NO_PASSES),
        (1024, 512, True, NO_PASSES),
        (512, 1024, False, NO_PASSES),
    ):
        plan = planned("sm90", ProductSizes(inputs, outputs, join))
        assert plan.passes == passes
        assert plan.reason
        assert plan.measured == NO_PASSES
    assert planned("sm75", ProductSizes(128, 256)).passes == NO_PASSES
    assert planned("sm80", ProductSizes(256, 128, join=True)).passes == Passes(forward=True)
    assert planned("sm80", ProductSizes(512, 256, join=True)).passes == NO_PASSES

    # What the rule does with a CUDA tensor, on a machine that has none.
    monkeypatch.setattr(layout, "architecture", lambda _index: "sm90")
    on_gpu: Any = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, device=SimpleNamespace(type="cuda", index=0)
    )
    weight = torch.zeros(256, 128, 1, 1)
    with caplog.at_level(logging.INFO, logger="coded_resnext"):
        for _ in range(2):
            chosen = convolution.select_products(on_gpu, weight, "triton")
            assert chosen == ALL_PASSES
    assert len(caplog.records) == 1
    assert "predicted" in caplog.text
    # What was not measured has to be asked for.
    assert convolution.select_products(on_gpu, weight, "auto") == NO_PASSES
    forward = Passes(forward=True)
    measured = {(128, 256): Plan(ALL_PASSES, "measured", measured=forward)}
    monkeypatch.setattr(conv1x1_rows, "CONVOLUTIONS", measured)
    backend.choose_passes.cache_clear()
    assert convolution.select_products(on_gpu, weight, "auto") == forward
    assert convolution.select_products(on_gpu, weight, "torch") == NO_PASSES
    on_gpu.dtype = torch.float64
    assert convolution.select_products(on_gpu, weight, "auto") == NO_PASSES


@pytest.mark.parametrize(
    ("inputs", "outputs", "passes"), [(128, 256, ALL_PASSES), (136, 24, NO_PASSES)]
)
def test_the_choice_for_a_gpu_is_compiled_whole(
    inputs: int,
    outputs: int,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On fake CUDA tensors, which need no GPU: on the CPU the rule ends before its table."""
    monkeypatch.setattr(layout, "architecture", lambda _index: "sm90")

    def choose(x: Tensor, weight: Tensor) -> tuple[Tensor, Passes]:
        return x.relu(), convolution.select_products(x, weight, "triton")

    compiled = torch.compile(choose, fullgraph=True, dynamic=False, backend="eager")
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger=backend.LOGGER.name):
        x = torch.empty(2, inputs, 3, 3, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(outputs, inputs, 1, 1, dtype=torch.bfloat16, device="cuda")
        y, chosen = compiled(x, weight)
    assert y.device.type == "cuda"
    assert chosen == passes
    said = [r.getMessage() for r in caplog.records if r.name == backend.LOGGER.name]
    assert [f"inputs={inputs}, outputs={outputs}" in text for text in said] == [True]


def test_kernels_asked_for_by_name_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "interpreted", lambda: False)
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 8, 1, 1)
    with pytest.raises(RuntimeError, match=r"backend: 'triton' .* CUDA tensors, not on cpu"):
        convolution.select_products(x, weight, "triton")
    monkeypatch.setattr(layout, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=r"backend: 'triton' .* not torch.float64"):
        convolution.select_products(x.double(), weight.double(), "triton")
    with pytest.raises(
        ValueError, match="expected one of auto, torch, merged, triton; got 'cudnn'"
    ):
        convolution.select_products(x, weight, "cudnn")  # type: ignore[arg-type]
