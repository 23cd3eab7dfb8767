"""The Triton kernels of the grouped convolution, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases.conv3x3 import GroupedCase, defined
from support.guarded_memory import GuardedMemory, guarded_memory
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels import grouped_conv3x3, rows
from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.batch_norm.rows import merge_statistics
from coded_resnext.kernels.conv3x3 import launch as conv3x3_launch
from coded_resnext.kernels.conv3x3.rows import MOST_ROWS, GroupedSizes, GroupedWindows
from coded_resnext.kernels.layout import interpreted

# Float32: rounding of sums of at most a few hundred products. The others: rounding of the results,
# whose half unit is 2^-9 and 2^-12 of the largest, and of the gradient that goes in, to as much.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Sums of the kernels are float32 whatever the activations are, from operands that are exact.
SUM_TOLERANCE = 2e-6

WIDTHS = [
    GroupedCase("width_1", N=5, D=1, H=3, W=4),
    GroupedCase("width_1_stride_2", N=16, D=1, H=6, W=3, stride=2),
    GroupedCase("width_3", N=8, D=3, H=2, W=5),
    GroupedCase("width_3_stride_2", N=4, D=3, H=7, W=7, stride=2),
    GroupedCase("width_4", N=8, D=4, B=3, H=7, W=13),
    GroupedCase("width_4_stride_2", N=4, D=4, H=8, W=6, stride=2),
    GroupedCase("width_6", N=4, D=6, H=4, W=4),
    GroupedCase("width_6_stride_2", N=5, D=6, B=1, H=5, W=4, stride=2),
    GroupedCase("width_8", N=4, D=8, H=5, W=5),
    GroupedCase("width_8_stride_2", N=2, D=8, H=3, W=11, stride=2),
    GroupedCase("width_11", N=3, D=11, H=4, W=3),
    GroupedCase("width_11_stride_2", N=2, D=11, H=5, W=5, stride=2),
    GroupedCase("width_12", N=2, D=12, H=6, W=4),
    GroupedCase("width_12_stride_2", N=3, D=12, H=4, W=4, stride=2),
    GroupedCase("width_16", N=2, D=16, H=15, W=15, B=1),
    GroupedCase("width_16_stride_2", N=1, D=16, H=14, W=15, stride=2),
    GroupedCase("width_22", N=2, D=22, H=3, W=3),
    GroupedCase("width_22_stride_2", N=1, D=22, H=4, W=5, stride=2),
    GroupedCase("width_24", N=2, D=24, H=2, W=3),
    GroupedCase("width_24_stride_2", N=1, D=24, H=3, W=6, stride=2),
    GroupedCase("width_32", N=1, D=32, H=5, W=5),
    GroupedCase("width_32_stride_2", N=2, D=32, H=5, W=4, stride=2),
    GroupedCase("width_44", N=1, D=44, H=2, W=3),
    GroupedCase("width_44_stride_2", N=1, D=44, H=3, W=2, stride=2),
]
REGIMES = [
    GroupedCase("one_pixel", H=1, W=1),
    GroupedCase("one_pixel_stride_2", H=1, W=1, stride=2),
    GroupedCase("one_sample_one_group_one_row", N=1, D=8, B=1, H=1, W=9),
    GroupedCase("one_row_stride_2", N=1, B=1, H=1, W=8, stride=2),
    GroupedCase("one_column", N=4, B=3, H=6, W=1),
    GroupedCase("one_column_stride_2", N=4, B=3, H=5, W=1, stride=2),
    GroupedCase("two_parts_of_rows", H=MOST_ROWS + 3, W=3, B=1),
    GroupedCase("two_parts_of_rows_stride_2", H=2 * MOST_ROWS + 3, W=2, B=1, stride=2),
    GroupedCase("lanes_end_inside_a_tile", N=4, B=5, H=2, W=9),
    GroupedCase("lanes_end_inside_a_tile_stride_2", N=4, B=5, H=3, W=9, stride=2),
    GroupedCase("plain", affine=False, statistics=False, H=5, W=3),
    GroupedCase("plain_stride_2", affine=False, statistics=False, H=5, W=3, stride=2),
    GroupedCase("affine_alone", statistics=False, W=3),
    GroupedCase("affine_alone_stride_2", statistics=False, H=3, stride=2),
    GroupedCase("statistics_alone", affine=False, H=3),
    GroupedCase("statistics_alone_stride_2", affine=False, W=5, stride=2),
]


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def launched(
    case: GroupedCase, inputs: dict[str, Tensor], memory: GuardedMemory
) -> dict[str, Tensor]:
    """Output, statistics and all gradients by the kernels."""
    sizes = GroupedSizes(case.N, case.D, case.stride)
    x, weight = memory.guarded(inputs["x"]), inputs["weight"]
    scale, bias = inputs.get("scale"), inputs.get("bias")
    y, partial = conv3x3_launch.forward(x, weight, sizes, scale, bias, case.statistics)
    results = {"y": y}
    kept = curve = level = None
    grad, grad_statistics = case.output_gradients(x.dtype)
    grad = memory.guarded(grad)
    if case.statistics:
        assert partial is not None
        statistics = batch_norm_launch.merged(partial, kernels=True)
        results["statistics"] = statistics
        kept, curve = memory.guarded(y), 2 * grad_statistics[2]
        level = grad_statistics[1] - curve * statistics[1] / statistics[0]
    grad_x, sums = conv3x3_launch.input_gradient(
        grad, weight, sizes, (case.H, case.W), kept, curve, level, x, scale, bias
    )
    results["grad_x"] = grad_x
    results["grad_weight"] = conv3x3_launch.weight_gradient(
        grad, sizes, kept, curve, level, x, scale, bias, x.dtype
    )
    assert (sums is not None) == case.affine
    if sums is not None:
        results["grad_bias"], results["grad_scale"] = sums.sum(0)
    return results


def errors(case: GroupedCase, dtype: torch.dtype, memory: GuardedMemory) -> dict[str, float]:
    """Errors of everything a case gives, each over its tolerance."""
    inputs = case.inputs(dtype)
    actual = launched(case, inputs, memory)
    expected = defined(case, inputs, rounded=True)
    assert set(actual) == set(expected)
    scaled = {}
    for name, value in expected.items():
        exact = name == "statistics"
        assert actual[name].dtype == (
            dtype if name in ("y", "grad_x", "grad_weight") else torch.float32
        )
        tolerance = SUM_TOLERANCE if exact else TOLERANCES[dtype]
        parts = zip(actual[name], value, strict=True) if exact else [(actual[name], value)]
        scaled[name] = max(relative_error(a.double(), b) / tolerance for a, b in parts)
    return scaled


# Of each width one of the two strides is long, of the next one the other.
LONG = {case.name for n, case in enumerate(WIDTHS) if n % 4 in (1, 2)}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.long if case.name in LONG else ())
        for case in WIDTHS + REGIMES
    ],
)
def test_equals_the_float64_definition(case: GroupedCase, memory: GuardedMemory) -> None:
    actual = errors(case, torch.float32, memory)
    assert max(actual.values()) < 1, actual


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_rounds_operands_and_results_only(
    dtype: torch.dtype, stride: int, memory: GuardedMemory
) -> None:
    case = GroupedCase("half", N=2, D=8, H=5, W=6, stride=stride)
    actual = errors(case, dtype, memory)
    assert max(actual.values()) < 1, actual


@pytest.mark.long
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 5),
    D=st.integers(1, 13),
    B=st.integers(1, 3),
    H=st.integers(1, 6),
    W=st.integers(1, 6),
    stride=st.sampled_from((1, 2)),
    affine=st.booleans(),
    statistics=st.booleans(),
)
def test_any_sizes(
    N: int, D: int, B: int, H: int, W: int, stride: int, affine: bool, statistics: bool
) -> None:
    with guarded_memory() as memory:
        case = GroupedCase("any", N, D, B, H, W, stride, affine, statistics)
        actual = errors(case, torch.float32, memory)
    assert max(actual.values()) < 1, actual


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "unaligned"])
def test_any_layout_is_read_right(layout: str) -> None:
    case = GroupedCase("layout", H=3, W=4)
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
        rows = flat[1:].view(case.B, case.H, case.W, -1)
        changed = rows.permute(0, 3, 1, 2)
    sizes = GroupedSizes(case.N, case.D)
    y, _ = conv3x3_launch.forward(
        changed, inputs["weight"], sizes, inputs["scale"], inputs["bias"], False
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y.double(), defined(case, inputs, rounded=False)["y"]) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
def test_the_operator_runs_the_kernels(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function with `triton`, values and gradients are those of the kernels."""
    case = GroupedCase("operator", D=3, H=3, W=5, stride=stride)
    inputs = case.inputs(torch.float32)
    expected = defined(case, inputs, rounded=False)
    launches: list[str] = []
    launch = rows.LaunchRow.launch

    def note(row: rows.LaunchRow, grid: tuple[int, ...], *args: object) -> None:
        launches.append(row.kernel.partition(":")[2])
        launch(row, grid, *args)

    monkeypatch.setattr(rows.LaunchRow, "launch", note)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y, statistics = grouped_conv3x3(
        leaves["x"],
        leaves["weight"],
        case.N,
        stride=stride,
        scale=leaves["scale"],
        bias=leaves["bias"],
        statistics=True,
        backend="triton",
    )
    assert statistics is not None
    gradients = torch.autograd.grad(
        (y, statistics), list(leaves.values()), case.output_gradients(torch.float32)
    )
    assert set(launches) == {
        "pack_weights",
        f"forward_stride{stride}",
        "merge_statistics",
        f"input_gradient_stride{stride}",
        f"weight_gradient_stride{stride}",
        "reduce_weight_gradient",
    }
    assert relative_error(y.double(), expected["y"]) < 1e-6
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative_error(gradient.double(), expected[f"grad_{name}"]) < 2e-6, name


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = GroupedCase("frozen", H=2, W=2, affine=False, statistics=False)
    inputs = case.inputs(torch.float32)
    expected = defined(case, inputs, rounded=False)
    grad, _ = case.output_gradients(torch.float32)
    for needed, unused in (("weight", "input_gradient"), ("x", "weight_gradient")):
        leaves = {
            name: value.detach().requires_grad_(name == needed) for name, value in inputs.items()
        }
        y, statistics = grouped_conv3x3(leaves["x"], leaves["weight"], case.N, backend="triton")
        assert statistics is None
        with monkeypatch.context() as patch:
            patch.setattr(conv3x3_launch, unused, None)
            (gradient,) = torch.autograd.grad(y, leaves[needed], grad)
        assert relative_error(gradient.double(), expected[f"grad_{needed}"]) < 1e-6


def test_statistics_of_values_far_from_zero() -> None:
    """A mean of 100 standard deviations, where E[x^2] - E[x]^2 in float32 has two digits left."""
    case = GroupedCase("far", N=4, D=4, B=4, H=19, W=12, affine=False)
    inputs = case.inputs(torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(inputs["x"].shape, generator=generator)
    inputs["x"] = x.contiguous(memory_format=torch.channels_last)
    # The middle tap alone, so that the padding does not make the values vary.
    weight = torch.zeros_like(inputs["weight"])
    weight[:, 0, 1, 1] = 1
    inputs["weight"] = weight
    sizes = GroupedSizes(case.N, case.D)
    y, partial = conv3x3_launch.forward(x, weight, sizes, None, None, True)
    assert partial is not None
    actual = batch_norm_launch.merged(partial, kernels=True)
    values = y.double().transpose(0, 1).flatten(1)
    m2 = (values - values.mean(1, keepdim=True)).square().sum(1)
    assert relative_error(actual[2].double(), m2) < 1e-3
    naive = (values.float().square().mean(1) - values.float().mean(1).square()) * values.shape[1]
    assert relative_error(naive.double(), m2) > 1e-3


@pytest.mark.parametrize("parts", [1, 3, 300])
def test_merged_statistics_are_those_of_all_values(parts: int) -> None:
    """Parts of different sizes, an empty one among them, and more than one block of parts."""
    generator = torch.Generator().manual_seed(0)
    channels = 11
    pieces = [
        1e3 + torch.randn(n % 7, channels, generator=generator, dtype=torch.float64)
        for n in range(3, 3 + parts)
    ]
    partial = torch.stack(
        [
            torch.stack(
                [
                    torch.full((channels,), float(len(p)), dtype=torch.float64),
                    p.sum(0),
                    ((p - p.mean(0)).square().sum(0) if len(p) else p.sum(0)),
                ]
            )
            for p in pieces
        ]
    ).float()
    total = torch.full((3, channels), torch.nan)
    merge_statistics(channels).launch((-(-channels // 8),), total, partial, parts)
    values = torch.cat(pieces)
    assert total[0].tolist() == [len(values)] * channels
    assert relative_error(total[1].double(), values.sum(0)) < 1e-6
    # The parts' sums are rounded to float32, which moves their means by 1e-4 or so.
    m2 = (values - values.mean(0)).square().sum(0)
    assert relative_error(total[2].double(), m2) < 1e-3


def test_windows_hold_whole_groups_and_start_at_16_bytes() -> None:
    expected = {1: (16, 1), 3: (8, 3), 4: (4, 4), 6: (4, 6), 8: (2, 8), 11: (2, 12), 12: (2, 12)}
    expected |= {16: (1, 16), 22: (1, 24), 24: (1, 24), 32: (1, 32), 44: (1, 48), 64: (1, 64)}
    for width, (group, padded) in expected.items():
        windows = GroupedWindows.of(GroupedSizes(16, width))
        assert (windows.group, windows.padded) == (group, padded), width
    for width in range(1, 65):
        for groups in (1, 5, 10, 32):
            sizes = GroupedSizes(groups, width)
            windows = GroupedWindows.of(sizes)
            assert windows.channels % 8 == 0
            assert 16 <= windows.channels <= windows.block_k <= 64
            assert windows.padded >= width
            assert windows.count * windows.group >= groups > (windows.count - 1) * windows.group
            assert windows.fit(sizes) == (windows.count * windows.channels == groups * width)


@pytest.mark.parametrize("width", [3, pytest.param(8, marks=pytest.mark.long)])
def test_a_weight_has_a_layout_and_a_dtype_of_its_own(width: int) -> None:
    """Both are read and written by the kernels that pack it and reduce its gradient, so that no
    copy is made. Rounded and moved in the same way, numbers are the same to the bit."""
    generator = torch.Generator().manual_seed(width)
    sizes, channels = GroupedSizes(4, width, 1), 4 * width
    x, grad = torch.randn(2, 2, channels, 5, 4, generator=generator).half()
    weight = torch.randn(channels, width, 3, 3, generator=generator)
    last = weight.to(memory_format=torch.channels_last)
    expected, _ = conv3x3_launch.forward(x, weight.half(), sizes, None, None, False)
    for own in (weight, last, last.half()):
        y, _ = conv3x3_launch.forward(x, own, sizes, None, None, False)
        assert y.dtype == torch.float16
        assert torch.equal(y, expected)
    reference = torch.nn.functional.conv2d(x.double(), weight.half().double(), None, 1, 1, 1, 4)
    assert relative_error(expected.double(), reference) < 1e-3
    arguments = (grad, sizes, None, None, None, x, None, None, torch.float32)
    contiguous, other = (conv3x3_launch.weight_gradient(*arguments, kept) for kept in (False, True))
    assert torch.equal(contiguous, other)
    assert [conv3x3_launch.is_last(each) for each in (contiguous, other)] == [False, True]


@pytest.mark.parametrize("others", [0, 1, 3])
def test_other_weights_are_rounded_on_the_way(others: int) -> None:
    """Of more and of fewer elements than a program takes."""
    torch.manual_seed(0)
    shapes = [(40, 30, 1, 1), (1, 1, 1, 1), (64, 32, 1, 1)][:others]
    weights = [torch.randn(shape) for shape in shapes]
    sizes, weight = GroupedSizes(4, 8, 1), torch.randn(32, 8, 3, 3)
    with guarded_memory():
        packed, casts = conv3x3_launch.pack(weight, sizes, torch.float16, weights)
    assert len(casts) == others
    for cast, other in zip(casts, weights, strict=True):
        assert torch.equal(cast, other.half())
    forward, backward = packed
    assert torch.equal(backward, forward.flip(1).transpose(2, 3))
    assert packed.count_nonzero() == 2 * weight.half().count_nonzero()
