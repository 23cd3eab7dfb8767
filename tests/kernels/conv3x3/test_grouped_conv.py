"""The grouped convolution as an operator: definition, gradients, choice of kernels, bad input."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases.conv3x3 import GroupedCase, defined
from support.helpers import relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coded_resnext.kernels import backend, grouped_conv3x3, layout
from coded_resnext.kernels.conv3x3 import convolution as conv3x3
from coded_resnext.kernels.conv3x3 import launch as conv3x3_launch
from coded_resnext.kernels.conv3x3 import rows as conv3x3_rows
from coded_resnext.kernels.conv3x3.library import reference as definition
from coded_resnext.kernels.conv3x3.rows import GroupedSizes, planned
from coded_resnext.kernels.residual.launch import reference_statistics
from coded_resnext.kernels.rows import ALL_PASSES, NO_PASSES, Passes, Plan

PYTORCH = NO_PASSES.encoded()
CASES = [
    GroupedCase("odd_map", N=2, D=3, H=5, W=3),
    GroupedCase("stride_2", N=2, D=3, H=4, W=5, stride=2),
    GroupedCase("one_pixel", N=3, D=2, H=1, W=1, B=3),
    GroupedCase("one_group", N=1, D=3, H=3, W=2, stride=2),
    GroupedCase("plain", N=2, D=2, H=3, W=3, affine=False, statistics=False),
    GroupedCase("affine_alone", N=2, D=2, H=3, W=2, statistics=False),
    GroupedCase("statistics_alone", N=2, D=2, H=2, W=3, affine=False),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def call(case: GroupedCase, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The public function on the tensors of a case, in their order."""
    x, weight, *affine = tensors
    scale, bias = affine or (None, None)
    y, statistics = grouped_conv3x3(
        x,
        weight,
        case.N,
        stride=case.stride,
        scale=scale,
        bias=bias,
        statistics=case.statistics,
    )
    return (y,) if statistics is None else (y, statistics)


@cases
def test_the_definition_is_that_of_pytorch(case: GroupedCase) -> None:
    inputs = case.inputs(torch.float64)
    x = inputs["x"]
    if case.affine:
        x = F.relu(x * inputs["scale"][:, None, None] + inputs["bias"][:, None, None])
    expected = F.conv2d(x, inputs["weight"], None, case.stride, 1, 1, case.N)
    actual = definition(
        inputs["x"],
        inputs["weight"],
        case.N,
        case.stride,
        inputs.get("scale"),
        inputs.get("bias"),
    )
    assert relative_error(actual, expected) < 1e-14
    count, total, m2 = reference_statistics(expected)
    variance, mean = torch.var_mean(expected, (0, 2, 3), correction=0)
    assert relative_error(total / count, mean) < 1e-14
    assert (m2 / count - variance).abs().max() < 1e-14


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_definition(case: GroupedCase, dtype: torch.dtype) -> None:
    # Float32 rounds sums; bfloat16 also results, and the gradient that goes into the convolution.
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    inputs = case.inputs(dtype)
    expected = defined(case, inputs, rounded=True)
    leaves = [value.requires_grad_() for value in inputs.values()]
    outputs = call(case, *leaves)
    gradients = torch.autograd.grad(outputs, leaves, case.output_gradients(dtype)[: len(outputs)])
    actual = dict(zip(("y", "statistics"), outputs, strict=False))
    actual |= {f"grad_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    assert set(actual) == set(expected)
    assert actual["y"].dtype == dtype
    assert actual["y"].is_contiguous(memory_format=torch.channels_last)
    errors = {name: relative_error(actual[name].double(), expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@cases
def test_gradcheck(case: GroupedCase) -> None:
    leaves = tuple(value.requires_grad_() for value in case.inputs(torch.float64).values())
    assert torch.autograd.gradcheck(lambda *tensors: call(case, *tensors), leaves)


def test_a_step_of_batch_norm_without_a_pass_over_the_map() -> None:
    """Statistics of one call, turned into the affine map of the next: BatchNorm in training."""
    case = GroupedCase("chain", N=2, D=3, H=5, W=4, affine=False)
    inputs = case.inputs(torch.float64)
    x, first = (value.requires_grad_() for value in inputs.values())
    second = (first.detach().flip(0) + 0.1).requires_grad_()
    gain = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
    shift = torch.linspace(-0.2, 0.2, 6, dtype=torch.float64, requires_grad=True)
    leaves = (x, first, second, gain, shift)

    y, statistics = grouped_conv3x3(x, first, case.N, statistics=True)
    assert statistics is not None
    count, total, m2 = statistics
    mean, scale = total / count, gain * (m2 / count + 1e-5).rsqrt()
    actual, _ = grouped_conv3x3(y, second, case.N, stride=2, scale=scale, bias=shift - mean * scale)
    z = F.batch_norm(F.conv2d(x, first, None, 1, 1, 1, 2), None, None, gain, shift, True)
    expected = F.conv2d(z.relu(), second, None, 2, 1, 1, 2)
    assert relative_error(actual, expected) < 1e-12
    gradients = (torch.autograd.grad(out.sin().sum(), leaves) for out in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_registered_as_pytorch_wants_it(stride: int, fused: bool) -> None:
    case = GroupedCase("op", N=2, D=3, H=3, W=4, stride=stride, affine=fused)
    inputs = {name: value.requires_grad_() for name, value in case.inputs(torch.float32).items()}
    x, weight, scale, bias = (inputs.get(name) for name in ("x", "weight", "scale", "bias"))
    torch.library.opcheck(
        conv3x3.grouped_conv3x3_operator, (x, weight, scale, bias, stride, fused, PYTORCH)
    )
    y, _ = call(case, *inputs.values())
    detached = [None if v is None else v.detach() for v in (x, weight, scale, bias)]
    terms = (y.detach(), torch.ones(6), torch.ones(6)) if fused else (None, None, None)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            conv3x3.grouped_conv3x3_backward,
            (torch.randn_like(y), *detached, *terms, stride, *needs, PYTORCH),
        )


def test_compiles_whole() -> None:
    case = GroupedCase("compiled", N=2, D=3, H=4, W=3)
    leaves = [value.requires_grad_() for value in case.inputs(torch.float32).values()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        y, statistics = call(case, *tensors)
        return y.sin().sum() + statistics[2].sqrt().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert relative_error(a, b) < 1e-6


def test_autocast_takes_both_operands() -> None:
    case = GroupedCase("autocast", N=2, D=4, affine=False)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, statistics = grouped_conv3x3(inputs["x"], inputs["weight"], case.N, statistics=True)
    assert y.dtype == torch.bfloat16
    assert statistics is not None
    assert statistics.dtype == torch.float32
    expected = defined(case, inputs, rounded=False)["y"]
    assert relative_error(y.double(), expected) < 2e-2


def test_nothing_is_chosen_that_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes, measured = GroupedSizes(32, 16, 2), Passes(forward=True, weight=True)
    assert planned("sm90", sizes) == Plan(ALL_PASSES, "not measured on sm90")
    monkeypatch.setitem(conv3x3_rows.WINS, ("sm90", 16, 2), measured)
    assert planned("sm90", sizes) == Plan(ALL_PASSES, "measured on sm90", measured)
    assert planned("sm80", sizes).measured == NO_PASSES
    monkeypatch.setitem(conv3x3_rows.WINS, ("sm90", 44, 1), measured)
    assert planned("sm90", GroupedSizes(10, 44)).measured == NO_PASSES
    assert "pad" in planned("sm90", GroupedSizes(10, 11)).reason

    # What the rule does with a CUDA tensor, on a machine that has none.
    monkeypatch.setattr(layout, "architecture", lambda _index: "sm90")
    on_gpu = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, device=SimpleNamespace(type="cuda", index=0)
    )
    weight = torch.zeros(512, 16, 3, 3)
    with caplog.at_level(logging.INFO, logger="coded_resnext"):
        for _ in range(2):
            chosen = conv3x3.select_passes(on_gpu, weight, 2, "auto")  # type: ignore[arg-type]
            assert chosen == measured
    assert len(caplog.records) == 1
    assert "measured on sm90" in caplog.text
    assert conv3x3.select_passes(on_gpu, weight, 2, "torch") == NO_PASSES  # type: ignore[arg-type]
    on_gpu.dtype = torch.float64
    assert conv3x3.select_passes(on_gpu, weight, 2, "auto") == NO_PASSES  # type: ignore[arg-type]


WON = Passes(forward=True, weight=True)


@pytest.mark.parametrize(("width", "passes"), [(16, WON), (4, NO_PASSES), (6, NO_PASSES)])
def test_the_choice_for_a_gpu_is_compiled_whole(
    width: int, passes: Passes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On fake CUDA tensors, which need no GPU: on the CPU the rule ends before its table."""
    monkeypatch.setattr(layout, "architecture", lambda _index: "sm90")
    monkeypatch.setitem(conv3x3_rows.WINS, ("sm90", 16, 1), WON)

    def choose(x: Tensor, weight: Tensor) -> tuple[Tensor, Passes]:
        return x.relu(), conv3x3.select_passes(x, weight, 1, "auto")

    compiled = torch.compile(choose, fullgraph=True, dynamic=False, backend="eager")
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger=backend.LOGGER.name):
        x = torch.empty(2, 2 * width, 3, 3, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(2 * width, width, 3, 3, dtype=torch.bfloat16, device="cuda")
        y, chosen = compiled(x, weight)
    assert y.device.type == "cuda"
    assert chosen == passes
    said = [r.getMessage() for r in caplog.records if r.name == backend.LOGGER.name]
    assert [f"width={width}" in text for text in said] == [True]


def test_kernels_asked_for_by_name_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "interpreted", lambda: False)
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"backend: 'triton' .* CUDA tensors, not on cpu"):
        grouped_conv3x3(x, weight, 2, backend="triton")
    monkeypatch.setattr(layout, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=r"backend: 'triton' .* not torch.float64"):
        grouped_conv3x3(x.double(), weight.double(), 2, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend: 'triton' .* up to 64 channels, not 65"):
        grouped_conv3x3(torch.randn(1, 65, 3, 3), torch.randn(65, 65, 3, 3), 1, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, 4)}, r"x: expected .*\[B, N\*D, H, W\], got .*\[2, 12, 4\]"),
        ({"x": torch.zeros(2, 12, 4, 4, dtype=torch.int32)}, "x: expected a floating-point"),
        ({"x": torch.zeros(0, 12, 4, 4)}, r"x: expected at least one sample.*\[0, 12, 4, 4\]"),
        ({"groups": 5}, "groups: expected a divisor of 12 channels, got 5"),
        (
            {"weight": torch.zeros(12, 4, 3, 3)},
            r"weight: expected \[12, 3, 3, 3\].*\[12, 4, 3, 3\]",
        ),
        ({"weight": torch.zeros(12, 3, 3, 3).double()}, "weight: expected .*float32.*float64"),
        ({"stride": 3}, "stride: expected 1 or 2, got 3"),
        ({"scale": None}, "scale: expected scale and bias, or neither"),
        ({"bias": None}, "bias: expected scale and bias, or neither"),
        ({"scale": torch.ones(3)}, r"scale: expected \[12\] on cpu, got \[3\]"),
        ({"bias": torch.ones(12).long()}, "bias: expected floating-point numbers, got torch.int64"),
        ({"backend": "cudnn"}, "backend: expected one of auto, torch, merged, triton; got 'cudnn'"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 12, 4, 4),
        "weight": torch.zeros(12, 3, 3, 3),
        "groups": 4,
        "scale": torch.ones(12),
        "bias": torch.ones(12),
    }
    grouped_conv3x3(**arguments)
    with pytest.raises(ValueError, match=message):
        grouped_conv3x3(**{**arguments, **change})


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_precision_of_convolutions_is_read_by_its_newer_name(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has set it cannot read the older `allow_tf32` any more."""
    case = GroupedCase("precision")
    variants = []
    real = layout.variant_of
    monkeypatch.setattr(
        conv3x3_launch,
        "variant_of",
        lambda *args, **options: variants.append(real(*args, **options)) or variants[-1],
    )
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        grouped_conv3x3(**case.inputs(torch.float32), groups=case.N, backend="triton")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert [variant.precision for variant in variants] == [precision]
