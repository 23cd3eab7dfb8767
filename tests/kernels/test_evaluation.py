"""The convolutions of evaluation, by kernels in Triton's interpreter and by PyTorch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.cases.conv1x1 import ProductCase
from support.cases.conv3x3 import GroupedCase
from support.guarded_memory import guarded_memory
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels import evaluation, layout
from coded_resnext.kernels.coded import gram
from coded_resnext.kernels.coded import reference as coded_reference
from coded_resnext.kernels.conv3x3 import launch as conv3x3_launch
from coded_resnext.kernels.conv3x3 import library as conv3x3_library
from coded_resnext.kernels.conv3x3.rows import MOST_ROWS, GroupedSizes
from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.rows import NO_PASSES, LaunchRow, Passes

# Who computes, as the operators take it.
FORWARD = Passes(forward=True).encoded()
POINTWISE = Passes(pointwise=True).encoded()
PYTORCH = NO_PASSES.encoded()
# Results are rounded once. Energies are those of what was rounded, in float32.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# By PyTorch the bias, and what is added to the residual, is rounded too.
LIBRARY_TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.2e-2}

GROUPED = [
    GroupedCase("width_1", N=16, D=1, H=3, W=4),
    GroupedCase("width_4", N=10, D=4, B=3, H=7, W=13),
    GroupedCase("width_4_stride_2", N=10, D=4, B=3, H=7, W=5, stride=2),
    GroupedCase("width_6", N=5, D=6, H=4, W=3),
    GroupedCase("width_11", N=3, D=11, H=4, W=3),
    GroupedCase("width_11_stride_2", N=3, D=11, H=5, W=5, stride=2),
    GroupedCase("width_24", N=2, D=24, H=2, W=3),
    GroupedCase("width_32", N=2, D=32, H=5, W=5),
    GroupedCase("width_32_stride_2", N=1, D=32, H=5, W=4, stride=2),
    GroupedCase("width_44", N=1, D=44, H=2, W=3),
    GroupedCase("one_pixel", H=1, W=1),
    GroupedCase("one_column_stride_2", B=3, H=5, W=1, stride=2),
    GroupedCase("two_parts_of_rows", H=MOST_ROWS + 3, W=3, B=1),
    GroupedCase("two_parts_of_rows_stride_2", H=2 * MOST_ROWS + 3, W=2, B=3, stride=2),
    GroupedCase("samples_share_a_tile", B=5, H=2, W=9),
]
PRODUCTS = [
    ProductCase("odd", I=7, O=5, B=3, H=3, W=3),
    ProductCase("one_pixel", I=16, O=24, B=3, H=1, W=1),
    ProductCase("steps_over_channels", I=96, O=72, B=3, H=5, W=5),
    ProductCase("samples_share_a_tile", I=16, O=136, B=5, H=3, W=5),
]


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def grouped_inputs(case: GroupedCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of a grouped convolution, one whole sample of whose branches is removed."""
    actual = replace(case, affine=False).inputs(dtype)
    generator = torch.Generator().manual_seed(7)
    actual["bias"] = torch.randn(case.N * case.D, generator=generator)
    actual["branch_weight"] = torch.randn(case.N, 24, case.D, generator=generator)
    actual["keep"] = torch.ones(case.B, case.N).bernoulli(0.6, generator=generator)
    actual["keep"][-1] = 0.0
    return actual


def grouped_defined(case: GroupedCase, inputs: dict[str, Tensor]) -> Tensor:
    """`h` in float64."""
    wide = {name: value.double() for name, value in inputs.items()}
    h = conv3x3_library.reference(wide["x"], wide["weight"], case.N, case.stride)
    h = (h + wide["bias"][:, None, None]).relu()
    if "keep" in wide:
        h = h * wide["keep"].repeat_interleave(case.D, 1)[:, :, None, None]
    return h


def grouped_called(
    case: GroupedCase, inputs: dict[str, Tensor], kernels: int
) -> tuple[Tensor, Tensor]:
    keep, bias = inputs.get("keep"), inputs["bias"]
    accumulate = layout.accumulation_dtype(inputs["x"].dtype)
    actual: tuple[Tensor, Tensor] = evaluation.folded_grouped_conv3x3(
        inputs["x"],
        inputs["weight"],
        bias.to(accumulate),
        inputs["branch_weight"],
        None if keep is None else keep.to(accumulate),
        case.stride,
        kernels,
    )
    return actual


def check_grouped(case: GroupedCase, dtype: torch.dtype, kernels: int, tolerance: float) -> None:
    inputs = grouped_inputs(case, dtype)
    for kept in (True, False):
        if not kept:
            del inputs["keep"]
        with guarded_memory() if kernels else nullcontext():
            h, energies = grouped_called(case, inputs, kernels)
        expected = grouped_defined(case, inputs)
        assert h.dtype == dtype
        assert h.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(h.double(), expected) < tolerance
        of_energies = coded_reference.branch_energy(h.double(), inputs["branch_weight"].double())
        # A form of bfloat16 is the sum of two terms of 8 bits, and a sign.
        exact = 2**-17 if dtype == torch.bfloat16 else 1e-6
        assert relative_error(energies.double(), of_energies) < exact
        assert not kept or energies[-1].count_nonzero() == 0


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_a_grouped_convolution_with_its_energies(case: GroupedCase) -> None:
    check_grouped(case, torch.float32, FORWARD, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_rounds_the_map_alone(dtype: torch.dtype, stride: int) -> None:
    case = GroupedCase("half", N=3, D=12, H=5, W=5, stride=stride)
    check_grouped(case, dtype, FORWARD, TOLERANCES[dtype])


@pytest.mark.parametrize("size", [1e4, 1e-6])
def test_forms_of_any_size(size: float) -> None:
    """In float16 they would themselves end in infinity, or in 0."""
    case = GroupedCase("exact", N=3, D=8, H=5, W=4)
    inputs = grouped_inputs(case, torch.float16)
    inputs["branch_weight"] *= size
    h, energies = grouped_called(case, inputs, FORWARD)
    expected = coded_reference.branch_energy(h.double(), inputs["branch_weight"].double())
    assert relative_error(energies.double(), expected) < 1e-6


@pytest.mark.parametrize("dtype", LIBRARY_TOLERANCES, ids=str)
@pytest.mark.parametrize("case", GROUPED[1:3], ids=lambda case: case.name)
def test_by_pytorch_it_is_the_same(case: GroupedCase, dtype: torch.dtype) -> None:
    check_grouped(case, dtype, PYTORCH, LIBRARY_TOLERANCES[dtype])


def test_a_plain_block_has_no_energies() -> None:
    case = GroupedCase("plain", H=3, W=5)
    inputs = grouped_inputs(case, torch.float32)
    del inputs["keep"]
    expected = grouped_defined(case, inputs)
    for kernels in (FORWARD, PYTORCH):
        h, energies = evaluation.folded_grouped_conv3x3(
            inputs["x"], inputs["weight"], inputs["bias"], None, None, 1, kernels
        )
        assert relative_error(h.double(), expected) < 1e-6
        assert energies.shape == (0,)


def test_energies_repeat_bit_by_bit() -> None:
    case = GroupedCase("repeat", N=4, D=4, B=2, H=MOST_ROWS + 5, W=11)
    inputs = grouped_inputs(case, torch.float32)
    first = grouped_called(case, inputs, FORWARD)
    for again in (grouped_called(case, inputs, FORWARD) for _ in range(2)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_energy_is_not_negative_and_nan_stays() -> None:
    case = GroupedCase("nan", N=4, D=4, B=2, H=3, W=3)
    inputs = grouped_inputs(case, torch.float32)
    del inputs["keep"]
    inputs["x"][0, 5, 1, 1] = torch.nan
    _, energies = grouped_called(case, inputs, FORWARD)
    assert energies.isnan().tolist() == [[True] * 4, [False] * 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "branch_forms", lambda *_: -torch.eye(4).expand(4, 4, 4))
        h, energies = grouped_called(case, inputs, FORWARD)
    assert h[1].max() > 0
    assert (energies[1] == 0).all()


def product_inputs(case: ProductCase, dtype: torch.dtype) -> dict[str, Tensor]:
    actual = replace(case, affine=False).inputs(dtype)
    generator = torch.Generator().manual_seed(3)
    actual["bias"] = torch.randn(case.O, generator=generator)
    actual["residual"] = torch.randn(case.B, case.O, case.H, case.W, generator=generator).to(dtype)
    actual["factor"] = torch.rand(case.B, generator=generator) + 0.5
    return actual


@pytest.mark.parametrize("kernels", [FORWARD, PYTORCH, POINTWISE])
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_a_product_with_all_that_is_behind_it(case: ProductCase, kernels: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = product_inputs(case, dtype)
        wide = {name: value.double() for name, value in inputs.items()}
        y = F.conv2d(wide["x"], wide["weight"])
        for names in ((), ("residual",), ("residual", "factor")):
            given = [inputs[name] if name in names else None for name in ("residual", "factor")]
            with guarded_memory() as memory:
                memory.empty((1,), torch.float32)
                actual = evaluation.folded_conv1x1(
                    inputs["x"], inputs["weight"], inputs["bias"], *given, kernels
                )
            factor = wide["factor"][:, None, None, None] if "factor" in names else 1.0
            expected = factor * y + wide["bias"][:, None, None]
            expected = (expected + (wide["residual"] if "residual" in names else 0.0)).relu()
            assert actual.dtype == dtype
            assert actual.is_contiguous(memory_format=torch.channels_last)
            tolerances = TOLERANCES if kernels == FORWARD else LIBRARY_TOLERANCES
            assert relative_error(actual.double(), expected) < tolerances[dtype], names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operands_side_by_side(dtype: torch.dtype) -> None:
    h, x = torch.randn(2, 3, 2, 2).to(dtype), torch.randn(2, 5, 4, 4).to(dtype)[:, :, ::2, ::2]
    factor = torch.rand(2).to(layout.accumulation_dtype(dtype))
    both = evaluation.side_by_side(h, factor, x)
    assert both.dtype == dtype
    assert both.is_contiguous(memory_format=torch.channels_last)
    # What is copied, and one product of two numbers, rounded once.
    assert torch.equal(both[:, 3:], x)
    assert torch.equal(both[:, :3], (h * factor[:, None, None, None]).to(dtype))
    assert torch.equal(evaluation.side_by_side(h, None, x)[:, :3], h)


@pytest.mark.parametrize("kernels", [FORWARD, PYTORCH])
def test_opcheck(kernels: int) -> None:
    case = GroupedCase("opcheck", H=3, W=3, stride=2)
    i = grouped_inputs(case, torch.float32)
    operator = evaluation.folded_grouped_conv3x3
    for weight, keep in ((i["branch_weight"], i["keep"]), (None, None)):
        torch.library.opcheck(operator, (i["x"], i["weight"], i["bias"], weight, keep, 2, kernels))
    i = product_inputs(ProductCase("opcheck", I=5, O=6), torch.float32)
    for residual, factor in ((None, None), (i["residual"], i["factor"])):
        torch.library.opcheck(
            evaluation.folded_conv1x1,
            (i["x"], i["weight"], i["bias"], residual, factor, kernels),
        )
    torch.library.opcheck(evaluation.side_by_side, (i["residual"], i["factor"], i["x"]))


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_where_pytorch_allows_it(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation, and nothing else changes with it."""
    rows: list[LaunchRow] = []
    monkeypatch.setattr(LaunchRow, "launch", lambda row, *_: rows.append(row))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    i = grouped_inputs(GroupedCase("tf32"), torch.float32)
    sizes = GroupedSizes(4, 4)
    conv3x3_launch.forward(i["x"], i["weight"], sizes, None, None, True)
    conv3x3_launch.folded_forward(i["x"], i["weight"], sizes, i["bias"], None, None)
    settings = [dict(row.constexprs) for row in rows if "forward_stride1" in row.kernel]
    assert [s["PRECISION"] for s in settings] == ["tf32" if allowed else "ieee"] * 2
    assert [s["FOLDED"] for s in settings] == [False, True]
