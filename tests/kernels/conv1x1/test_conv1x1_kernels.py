"""The Triton kernels of the 1x1 convolutions, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases.conv1x1 import ProductCase, called, defined
from support.guarded_memory import guarded_memory
from support.helpers import relative_error

from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.conv1x1 import launch as conv1x1_launch
from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.rows import ALL_PASSES, NO_PASSES, LaunchRow, Passes

# Float32: rounding of sums of at most a few hundred products. The others: rounding of the results
# and of the gradient that goes in, half units of 2^-9 and 2^-12, in gradients twice.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Statistics are float32 whatever the activations are; of the half precisions' activations some lie
# so near the middle of two numbers that float64 rounds them the other way.
STATISTICS_TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-4, torch.float16: 2e-5}

# Tiles of float32 have 32 pixels, blocks of 32 and 64 channels.
CASES = [
    ProductCase("one_block", I=16, O=16, B=1, H=4, W=4),
    ProductCase("one_pixel", I=16, O=24, B=1, H=1, W=1),
    ProductCase("pixels_end_inside_a_tile", B=3, H=5, W=7),
    ProductCase("exact_tiles", B=2, H=4, W=8),
    ProductCase("steps_over_channels", I=96, O=72),
    ProductCase("channels_end_inside_a_step", I=40, O=136, B=1),
    ProductCase("more_columns_than_steps", I=8, O=200, B=1, H=3),
    ProductCase("odd_channels", I=7, O=5, B=3, H=3, W=3),
    ProductCase("one_channel", I=1, O=1, H=2, W=3),
    ProductCase("plain", affine=False, statistics=False),
    ProductCase("affine_alone", statistics=False),
    ProductCase("statistics_alone", affine=False, I=40),
    ProductCase("gain", gain=True, I=40),
    ProductCase("gain_plain", gain=True, affine=False, O=40),
    ProductCase("join", join=True),
    ProductCase("join_of_one_pixel", join=True, B=1, H=1, W=1),
    ProductCase("join_identity", join=True, affine=False),
    ProductCase("join_steps", join=True, I=96, O=72, B=1),
    ProductCase("join_columns", join=True, I=72, O=136, B=1, affine=False),
    ProductCase("join_wide_columns_backward", join=True, I=136, O=24, B=1, H=7, W=5),
    ProductCase("join_without_signs", join=True, I=20, O=7, signs=False),
    ProductCase("join_without_statistics", join=True, statistics=False, affine=False),
]


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def errors(case: ProductCase, dtype: torch.dtype) -> dict[str, float]:
    """Errors of everything a case gives, each over its tolerance; memory is guarded."""
    inputs = case.inputs(dtype)
    with guarded_memory():
        actual = called(case, inputs, ALL_PASSES)
    expected = defined(case, inputs)
    assert set(actual) == set(expected)
    scaled = {}
    for name, value in expected.items():
        exact = name == "statistics"
        assert (
            actual[name].dtype == inputs.get(name.removeprefix("grad_"), actual["y"]).dtype or exact
        )
        tolerance = STATISTICS_TOLERANCES[dtype] if exact else TOLERANCES[dtype]
        parts = zip(actual[name], value, strict=True) if exact else [(actual[name], value)]
        scaled[name] = max(relative_error(a.double(), b) / tolerance for a, b in parts)
    return scaled


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_float64_definition(case: ProductCase) -> None:
    actual = errors(case, torch.float32)
    assert max(actual.values()) < 1, actual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision_rounds_operands_and_results_only(
    dtype: torch.dtype, join: bool, affine: bool
) -> None:
    # A weight that stays with its program, two tiles of pixels, two pieces of a gradient's columns.
    sizes = {"I": 256, "O": 40, "B": 1, "H": 9, "W": 8}
    case = ProductCase("half", **sizes, join=join, gain=not join, affine=affine)
    actual = errors(case, dtype)
    assert max(actual.values()) < 1, actual


def test_half_precision_in_steps_over_channels() -> None:
    case = ProductCase("half", I=264, O=136, B=1, H=3, W=3)
    actual = errors(case, torch.bfloat16)
    assert max(actual.values()) < 1, actual


@pytest.mark.long
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 80),
    B=st.integers(1, 3),
    H=st.integers(1, 5),
    W=st.integers(1, 5),
    join=st.booleans(),
    affine=st.booleans(),
    statistics=st.booleans(),
)
def test_any_sizes(
    inputs: int,
    outputs: int,
    B: int,
    H: int,
    W: int,
    join: bool,
    affine: bool,
    statistics: bool,
) -> None:
    signs = inputs % 8 == 0
    case = ProductCase("any", inputs, outputs, B, H, W, join, affine, statistics, signs=signs)
    actual = errors(case, torch.float32)
    assert max(actual.values()) < 1, actual


@pytest.mark.long
@pytest.mark.parametrize("join", [False, True])
def test_programs_that_share_the_tiles_give_the_same(
    join: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many programs there are; and bits repeat where as many are."""
    case = ProductCase("shared", I=40, O=72, B=2, H=8, W=9, join=join)
    inputs = case.inputs(torch.float32)
    expected = defined(case, inputs)
    for processors in (1, 2, 100):
        monkeypatch.setattr(conv1x1_launch, "INTERPRETED_PROCESSORS", processors)
        actual = called(case, inputs, ALL_PASSES)
        again = called(case, inputs, ALL_PASSES)
        for name, value in expected.items():
            assert torch.equal(actual[name], again[name])
            assert relative_error(actual[name].double(), value) < 1e-6, (processors, name)


@pytest.mark.parametrize("processors", [1, 4, 100])
def test_shares_of_a_weight_gradient_of_several_blocks(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers add up exactly, so that a tile of pixels lost, or taken twice, shows."""
    monkeypatch.setattr(conv1x1_launch, "INTERPRETED_PROCESSORS", processors)
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randint(-8, 9, (1, channels, 9, 17), generator=generator).float()
        for channels in (72, 136)
    )
    actual = conv1x1_launch.weight_gradient(grad, x, torch.empty(136, 72, 1, 1), None, None)
    expected = torch.einsum("bohw,bihw->oi", grad.double(), x.double())
    assert torch.equal(actual[:, :, 0, 0].double(), expected)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "unaligned"])
def test_any_layout_is_read_right(layout: str) -> None:
    case = ProductCase("layout", H=3, W=4)
    inputs = case.inputs(torch.float32)
    x = inputs["x"]
    if layout == "contiguous":
        changed = x.contiguous()
    elif layout == "sliced":
        changed = torch.cat([x, x], 3)[..., : case.W]
    elif layout == "expanded":
        x = inputs["x"] = x[:1].expand(case.B, -1, -1, -1)
        changed = x
    else:
        flat = torch.zeros(x.numel() + 1)
        flat[1:] = x.permute(0, 2, 3, 1).flatten()
        changed = flat[1:].view(case.B, case.H, case.W, -1).permute(0, 3, 1, 2)
    y, _ = conv1x1_launch.forward(changed, inputs["weight"], inputs["scale"], inputs["bias"], False)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y.double(), defined(case, inputs)["y"]) < 1e-6


@pytest.mark.parametrize("join", [False, True])
def test_the_operators_run_the_kernels(join: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    launch = LaunchRow.launch

    def note(row: LaunchRow, grid: tuple[int, ...], *args: object) -> None:
        launches.append(row.kernel.partition(":")[2])
        launch(row, grid, *args)

    monkeypatch.setattr(LaunchRow, "launch", note)
    case = ProductCase("operator", join=join)
    inputs = case.inputs(torch.float32)
    name = "join" if join else "product"
    kernels = {
        "forward": [f"{name}_forward", "merge_statistics"],
        "input": [f"{name}_input_gradient"],
        "weight": ["product_weight_gradient"],
        # Around PyTorch's products.
        "pointwise": ["pointwise_join"] * join + ["column_statistics", "merge_statistics"],
    }
    kernels["pointwise"] += ["pointwise_gradient"] + ["pointwise_join_backward"] * join
    # Whoever computes a pass, all give the same.
    expected = defined(case, inputs)
    for names in (*((name,) for name in kernels), ("input", "weight"), ()):
        passes = Passes(**dict.fromkeys(names, True))
        launches.clear()
        actual = called(case, inputs, passes)
        assert launches == [kernel for n in names for kernel in kernels[n]]
        for name_, value in expected.items():
            assert relative_error(actual[name_].double(), value) < 2e-6, (passes, name_)


@pytest.mark.parametrize("needed", ["weight", "x"])
def test_only_needed_gradients_are_computed(needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ProductCase("frozen", affine=False, statistics=False)
    inputs = case.inputs(torch.float32)
    expected = called(case, inputs, NO_PASSES)
    unused = "input_gradient" if needed == "weight" else "weight_gradient"
    monkeypatch.setattr(conv1x1_launch, unused, None)
    dtype = torch.float32 if needed == "weight" else None
    gradients = convolution.backward(
        *(case.gradients(torch.float32)["y"], None, None, None, None),
        *(inputs["x"], inputs["weight"], None, None, needed == "x", dtype, ALL_PASSES),
    )
    other, wanted = gradients.input, gradients.weight
    if needed == "x":
        other, wanted = wanted, other
    assert other is None
    assert wanted is not None
    assert relative_error(wanted.double(), expected[f"grad_{needed}"].double()) < 2e-6


@pytest.mark.long
def test_statistics_of_values_far_from_zero() -> None:
    """A mean of 100 standard deviations, where E[x^2] - E[x]^2 in float32 has two digits left."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(4, 16, 19, 12, generator=generator)
    weight = torch.eye(16)[:, :, None, None]
    y, partial = conv1x1_launch.forward(x, weight, None, None, True)
    assert partial is not None
    actual = batch_norm_launch.merged(partial, True)
    values = y.double().transpose(0, 1).flatten(1)
    assert relative_error(values, x.double().transpose(0, 1).flatten(1)) < 1e-6
    m2 = (values - values.mean(1, keepdim=True)).square().sum(1)
    assert actual[0].tolist() == [values.shape[1]] * 16
    assert relative_error(actual[1].double(), values.sum(1)) < 1e-6
    assert relative_error(actual[2].double(), m2) < 1e-5
    naive = (values.float().square().mean(1) - values.float().mean(1).square()) * values.shape[1]
    assert relative_error(naive.double(), m2) > 1e-3


def test_statistics_are_taken_before_the_output_is_rounded() -> None:
    """What bfloat16 rounds away, statistics still have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 5, 5, generator=generator).bfloat16()
    weight = torch.randn(8, 16, 1, 1, generator=generator).bfloat16()
    y, partial = conv1x1_launch.forward(x, weight, None, None, True)
    assert partial is not None
    actual = batch_norm_launch.merged(partial, True)
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    m2 = (exact - exact.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    assert relative_error(actual[2].double(), m2) < 1e-6
    wide = y.double()
    of_rounded = (wide - wide.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    assert relative_error(of_rounded, m2) > 1e-4
