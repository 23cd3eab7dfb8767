"""Kernels for a 1x1 convolution that is not stored, in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases.recompute import BOTH, CASES, Case, activated, by_channel, check_moments
from support.guarded_memory import guarded_memory
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.conv1x1 import launch as conv1x1_launch
from coded_resnext.kernels.conv1x1.rows import ProductSizes
from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.recompute import rows as recompute_rows
from coded_resnext.kernels.recompute.launch import moments, moments_gradient, product_join
from coded_resnext.kernels.rows import LaunchRow, Variant

# Results are rounded once, gradients twice: at the end of the product, and with the scale.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 8e-4}


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def results(case: Case, given: dict[str, Tensor]) -> list[Tensor]:
    """All that the three functions give, in one list."""
    before, names = (given["scale"], given["bias"]), ("residual_scale", "residual_bias")
    own = [given[name] for name in names]
    ends = (given["out_scale"], given["out_bias"], given["residual"], *own)
    gradient, sums = moments_gradient(
        given["grad"],
        given["weight"].float(),
        given["square"],
        given["shift"],
        given["x"],
        *before,
    )
    assert sums is not None
    return [
        *moments(given["x"], *before),
        *product_join(given["x"], *before, given["weight"], *ends, True),
        gradient,
        sums.sum(0),
    ]


@pytest.mark.long
def test_programs_that_share_the_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs there are; and bits repeat where as many are."""
    case = Case("shared", I=72, O=24, B=1, H=13, W=9)
    given = case.inputs(torch.float32)
    actual = []
    for processors in (1, 3, 3, 100):
        monkeypatch.setattr(conv1x1_launch, "INTERPRETED_PROCESSORS", processors)
        actual.append(results(case, given))
        check_moments(given)
    assert all(map(torch.equal, actual[1], actual[2]))
    for others in actual[1:]:
        for one, other in zip(actual[0], others, strict=True):
            assert relative_error(one.double(), other.double()) < 1e-6


# Options of the join: what there is beside the product and the bias.
JOINS: list[tuple[str, ...]] = [
    ("scale", "bias", "out_scale", "residual", "residual_scale", "residual_bias"),
    ("scale", "bias", "out_scale", "residual"),
    ("scale", "bias"),
    ("out_scale", "residual", "residual_scale", "residual_bias", "factor"),
    (),
]


def check_join(case: Case, given: dict[str, Tensor], names: tuple[str, ...]) -> None:
    has = {name: given[name] if name in names else None for name in JOINS[0] + JOINS[3]}
    keep_signs = case.O % 8 == 0
    with guarded_memory():
        joined, signs = product_join(
            given["x"],
            has["scale"],
            has["bias"],
            given["weight"],
            has["out_scale"],
            given["out_bias"],
            has["residual"],
            has["residual_scale"],
            has["residual_bias"],
            keep_signs,
            has["factor"],
        )
    a = activated({name: given[name] for name in ("x", *names) if name in given})
    y = torch.einsum("oi,bihw->bohw", given["weight"][:, :, 0, 0].double(), a)
    if "factor" in names:
        y = y * given["factor"].double()[:, None, None, None]
    if "out_scale" in names:
        y = y * by_channel(given["out_scale"])
    y = y + by_channel(given["out_bias"])
    residual = given["residual"].double() if "residual" in names else torch.zeros(1)
    if "residual_scale" in names:
        residual = residual * by_channel(given["residual_scale"])
        residual = residual + by_channel(given["residual_bias"])
    assert joined.dtype == given["x"].dtype
    assert joined.is_contiguous(memory_format=torch.channels_last)
    expected = torch.relu(y + residual)
    assert relative_error(joined.double(), expected) < TOLERANCES[joined.dtype], names
    if keep_signs:
        bits = signs[..., None].int() >> torch.arange(8, dtype=torch.int32) & 1
        assert torch.equal(bits.flatten(3).permute(0, 3, 1, 2) != 0, joined > 0)
    else:
        assert signs is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_join_that_computes_its_product(case: Case) -> None:
    for dtype in BOTH:
        check_join(case, case.inputs(dtype), JOINS[0])


@pytest.mark.parametrize("names", JOINS[1:], ids=lambda names: " ".join(names) or "bias")
def test_parts_of_a_join(names: tuple[str, ...]) -> None:
    case = Case("parts", I=40, O=72, B=3, H=3, W=5)
    for dtype in BOTH:
        check_join(case, case.inputs(dtype), names)


def test_the_scale_of_a_join_is_not_rounded() -> None:
    """It multiplies the float32 product: folded into a weight of float16 it would be lost."""
    case = Case("small")
    given = case.inputs(torch.float16)
    given["out_scale"] *= 1e-7
    given["out_bias"] *= 1e-7
    given["residual"].zero_()
    given["weight"] *= 100
    joined, _ = product_join(
        given["x"],
        None,
        None,
        given["weight"],
        given["out_scale"] * 1e3,
        given["out_bias"],
        None,
        None,
        None,
        False,
    )
    assert joined.count_nonzero() > joined.numel() // 4
    y = torch.einsum("oi,bihw->bohw", given["weight"][:, :, 0, 0].double(), given["x"].double())
    expected = torch.relu(y * by_channel(given["out_scale"] * 1e3) + by_channel(given["out_bias"]))
    assert relative_error(joined.double(), expected) < 2e-3


def check_gradient(given: dict[str, Tensor]) -> None:
    names = ("grad", "weight", "square", "shift", "x", "scale", "bias")
    dtype = given["x"].dtype
    with guarded_memory():
        actual, sums = moments_gradient(*(given.get(name) for name in names))
    x, h = given["x"].double(), activated(given)
    weight = given["weight"].to(dtype).double()
    size = given["square"].abs().max().clamp_min(1e-30)
    square = (given["square"] / size).to(dtype).double() * size.double()
    dh = torch.einsum("oi,bohw->bihw", weight, given["grad"].double())
    dh = dh + torch.einsum("ij,bjhw->bihw", square, h) + by_channel(given["shift"])
    tolerance = TOLERANCES[dtype]
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    if "scale" not in given:
        assert relative_error(actual.double(), dh) < tolerance
        assert sums is None
        return
    assert sums is not None
    dh = torch.where(by_channel(given["scale"]) * x + by_channel(given["bias"]) > 0, dh, 0.0)
    expected = torch.stack([dh.sum((0, 2, 3)), (dh * x).sum((0, 2, 3))])
    assert relative_error(actual.double(), dh * by_channel(given["scale"])) < tolerance
    assert relative_error(sums.double().sum(0), expected) < tolerance


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gradient_through_moments(case: Case, dtype: torch.dtype) -> None:
    given = case.inputs(dtype)
    given["weight"] = given["weight"][:, :, 0, 0].float()
    check_gradient(given)
    if case.I == 40:
        check_gradient({name: given[name] for name in given if name not in ("scale", "bias")})


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_squares_of_any_size(size: float) -> None:
    """In float16 they would have no digits left."""
    given = Case("square", I=24, O=8).inputs(torch.float16)
    given["weight"] = given["weight"][:, :, 0, 0].float()
    given["square"] *= size
    if size > 0:
        # They make all of the gradient.
        given["x"] *= 1000
        given["grad"].zero_()
        given["shift"].zero_()
    check_gradient(given)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("signs", [False, True])
def test_a_join_without_the_map_that_it_adds_to(mapped: bool, signs: bool) -> None:
    """Its gradient is the same to the bit, and so are the sums that are left."""
    case = Case("join", I=72, O=40, B=2, H=5, W=7)
    given = case.inputs(torch.float32)
    joined, packed = product_join(
        given["x"], None, None, torch.eye(72), None, torch.zeros(72), None, None, None, signs
    )
    arguments = (
        given["x"] if mapped else None,
        given["weight"],
        given["residual"],
        torch.ones(40),
        given["out_scale"],
        given["out_bias"],
        True,
    )
    actual = []
    for y in (given["x"].flip(0), None):
        with guarded_memory():
            actual.append(
                conv1x1_launch.join_input_gradient(
                    given["grad"], None, joined, packed if signs else None, y, *arguments
                )
            )
    (gradient, sums, moved), (alone, fewer, also_moved) = actual
    # The interpreter runs the same steps on the same numbers, and one sum less.
    assert torch.equal(gradient, alone)
    assert torch.equal(moved, also_moved)
    assert torch.equal(sums[:, [0, 2]] if mapped else sums[:, :1], fewer)
    assert relative_error(fewer.double().sum(0)[0], gradient.double().sum((0, 2, 3))) < 1e-6


def test_a_weight_gradient_that_is_not_rounded() -> None:
    given = Case("weight", I=24, O=40).inputs(torch.float16)
    grad, x, weight = given["grad"], given["x"], given["weight"]
    exact = torch.einsum("bohw,bihw->oi", grad.double(), x.double())[:, :, None, None]
    rounded = conv1x1_launch.weight_gradient(grad, x, weight, None, None)
    wide = conv1x1_launch.weight_gradient(grad, x, weight, None, None, torch.float32)
    assert (rounded.dtype, wide.dtype) == (torch.float16, torch.float32)
    assert relative_error(wide.double(), exact) < 1e-6
    # The same sums, rounded here and there.
    assert torch.equal(wide.half(), rounded)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "unaligned"])
def test_any_layout_is_read_right(layout: str) -> None:
    case = Case("layout", I=24, O=24, H=3, W=4)
    given = case.inputs(torch.float32)
    expected = results(case, given)
    for name in ("x", "residual", "grad"):
        x = given[name]
        if layout == "contiguous":
            given[name] = x.contiguous()
        elif layout == "sliced":
            given[name] = torch.cat([x, x], 3)[..., : case.W]
        elif layout == "expanded":
            given[name] = x[:1].expand(case.B, -1, -1, -1)
        else:
            flat = torch.zeros(x.numel() + 1)
            flat[1:] = x.permute(0, 2, 3, 1).flatten()
            rows = flat[1:].view(case.B, case.H, case.W, -1)
            given[name] = rows.permute(0, 3, 1, 2)
    if layout == "expanded":
        whole = {name: value.contiguous() for name, value in given.items()}
        expected = results(case, whole)
    # The interpreter runs the same steps on the same numbers, wherever they are read.
    assert all(map(torch.equal, results(case, given), expected))


@pytest.mark.parametrize("allowed", [False, True])
def test_moments_are_never_plain_tf32(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounding would be seen in small variances; everything else may have it."""
    rows: list[LaunchRow] = []
    monkeypatch.setattr(LaunchRow, "launch", lambda row, *_: rows.append(row))
    monkeypatch.setattr(layout, "tf32_allowed", lambda: allowed)
    results(Case("tf32"), Case("tf32").inputs(torch.float32))
    settings = {row.kernel.partition(":")[2]: dict(row.constexprs) for row in rows}
    actual = {name: row["PRECISION"] for name, row in settings.items() if "PRECISION" in row}
    assert actual == {
        "activation_moments": "tf32x3" if allowed else "ieee",
        "product_join": "tf32" if allowed else "ieee",
        "moments_input_gradient": "tf32" if allowed else "ieee",
    }


def test_sizes_name_the_steps_of_both_products() -> None:
    """A weight that stays with its program has a square that does."""
    variant = Variant("bf16")
    for inputs, outputs, steps in ((128, 256, (256, 128)), (256, 512, (64, 64)), (16, 8, (16, 16))):
        row = recompute_rows.moments_gradient(ProductSizes(inputs, outputs), variant)
        sizes = dict(row.constexprs)
        assert (sizes["BLOCK_K"], sizes["BLOCK_H"]) == steps
        single = recompute_rows.moments_gradient(
            ProductSizes(inputs, outputs), replace(variant, dtype="fp32")
        )
        assert dict(single.constexprs)["BLOCK_H"] <= 32
