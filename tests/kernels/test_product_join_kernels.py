"""Kernels for a 1x1 convolution that is not stored, in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from coded_resnext.kernels import conv1x1_arguments, conv1x1_launch, product_join_configs
from coded_resnext.kernels.configs import LaunchRow
from coded_resnext.kernels.conv1x1_configs import ProductSizes, ProductVariant
from coded_resnext.kernels.launch import interpreted
from coded_resnext.kernels.product_join_launch import moments, moments_gradient, product_join
from guarded_memory import guarded_memory
from helpers import relative_error
from holes import Holes
from torch import Tensor
from triton.runtime import interpreter

# Results are rounded once, gradients twice: at the end of the product, and with the scale.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 8e-4}
# The mean is that of what is multiplied, of which some lie so near the middle of two numbers that
# float64 rounds them the other way. Deviations are rounded before they are multiplied.
MEAN_TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-5}
SCATTER_TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4}


@dataclass(frozen=True)
class Case:
    """`I` channels to `O` on `B` maps of `H x W`. Tiles of float32 have 32 pixels and 64 channels,
    those of float16 64 and 128."""

    name: str
    I: int = 16  # noqa: E741
    O: int = 24  # noqa: E741
    B: int = 2
    H: int = 4
    W: int = 5

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All arguments of the three functions; vectors, and what a gradient multiplies by, in
        float32."""
        generator = torch.Generator().manual_seed(self.I * self.O + self.H)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(channels: int) -> Tensor:
            maps = normal(self.B, channels, self.H, self.W).to(dtype)
            return maps.contiguous(memory_format=torch.channels_last)

        square = normal(self.I, self.I) / math.sqrt(self.I)
        return {
            "x": image(self.I),
            "scale": normal(self.I),
            "bias": normal(self.I),
            "weight": (normal(self.O, self.I, 1, 1) / math.sqrt(self.I)).to(dtype),
            "out_scale": normal(self.O),
            "out_bias": normal(self.O),
            "residual": image(self.O),
            "residual_scale": normal(self.O),
            "residual_bias": normal(self.O),
            "factor": normal(self.B).abs() + 0.5,
            "grad": image(self.O),
            "square": square + square.T,
            "shift": normal(self.I),
        }


CASES = [
    Case("one_block"),
    Case("one_pixel", B=1, H=1, W=1),
    Case("one_channel", I=1, O=1, H=2, W=3),
    Case("exact_tiles", I=64, O=64, B=1, H=8, W=8),
    Case("pixels_end_inside_a_tile", I=24, B=3, H=5, W=7),
    Case("odd_channels", I=7, O=5, B=3, H=3, W=3),
    Case("steps_and_columns", I=40, O=136, B=1, H=7, W=9),
    Case("resident", I=128, O=256, B=1, H=5, W=7),
    Case("three_columns", I=200, O=40, B=1, H=9, W=8),
    Case("wide", I=256, O=24, B=1, H=3, W=7),
]
BOTH = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"


def by_channel(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def activated(given: dict[str, Tensor]) -> Tensor:
    """What the kernels multiply, in float64."""
    x = given["x"]
    if "scale" not in given:
        return x.double()
    h = torch.relu(by_channel(given["scale"]) * x.double() + by_channel(given["bias"]))
    return h.to(x.dtype).double()


def moments_of(a: Tensor) -> tuple[Tensor, Tensor]:
    pixels = a.transpose(0, 1).flatten(1)
    mean = pixels.mean(1)
    apart = pixels - mean[:, None]
    return mean, apart @ apart.T


def check_moments(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    dtype = given["x"].dtype
    with guarded_memory():
        mean, scatter = moments(given["x"], given.get("scale"), given.get("bias"))
    expected_mean, expected = moments_of(activated(given))
    assert mean.dtype == scatter.dtype == torch.float32
    assert relative_error(mean.double(), expected_mean) < MEAN_TOLERANCES[dtype]
    # Of one pixel it is 0, exactly.
    assert (scatter.double() - expected).norm() <= SCATTER_TOLERANCES[dtype] * expected.norm()
    assert torch.equal(scatter, scatter.T)
    return mean, scatter


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moments(case: Case, dtype: torch.dtype) -> None:
    given = case.inputs(dtype)
    check_moments(given)
    if case.I == 24:
        check_moments({"x": given["x"]})


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_moments_of_activations_far_from_zero(dtype: torch.dtype) -> None:
    """A mean of 1000 standard deviations, where `E[a a^T] - m m^T` has nothing left."""
    generator = torch.Generator().manual_seed(0)
    # In float16 there are three numbers in a standard deviation.
    x = (1000 + torch.randn(2, 24, 19, 12, generator=generator)).to(dtype)
    check_moments({"x": x})
    a = x.float().transpose(0, 1).flatten(1)
    naive = a @ a.T - a.shape[1] * a.mean(1)[:, None] * a.mean(1)
    assert relative_error(naive.double(), moments_of(x.double())[1]) > 1e-2


def test_moments_where_the_centre_is_far_from_the_mean() -> None:
    """The rows that it is the mean of are unlike all others."""
    x = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    assert product_join_configs.moments_tile(16, ProductVariant("fp16", arch="cpu")).k == 64
    x.view(1, 16, 64, 64)[:, :, :, 0] += 3
    check_moments({"x": x})


def test_moments_of_channels_without_any() -> None:
    given = Case("dead", I=24).inputs(torch.float16)
    given["scale"][3], given["bias"][3] = 0.0, -1.0
    given["scale"][5], given["bias"][5] = 0.0, 0.3
    mean, scatter = check_moments(given)
    assert mean[3] == 0
    assert scatter[3].count_nonzero() == scatter[5].count_nonzero() == 0
    given["x"][1, 7, 2, 2] = torch.nan
    mean, scatter = moments(given["x"], given["scale"], given["bias"])
    touched = torch.zeros(24, dtype=torch.bool)
    touched[7] = True
    assert torch.equal(mean.isnan(), touched)
    assert torch.equal(scatter.isnan(), touched | touched[:, None])


def results(case: Case, given: dict[str, Tensor]) -> list[Tensor]:
    """All that the three functions give, in one list."""
    before, names = (given["scale"], given["bias"]), ("residual_scale", "residual_bias")
    own = [given[name] for name in names]
    ends = (given["out_scale"], given["out_bias"], given["residual"], *own)
    return [
        *moments(given["x"], *before),
        *product_join(given["x"], *before, given["weight"], *ends, case.O % 8 == 0),
        *moments_gradient(
            given["grad"],
            given["weight"].float(),
            given["square"],
            given["shift"],
            given["x"],
            *before,
        ),
    ]


def test_programs_that_share_the_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs there are; and bits repeat where as many are."""
    case = Case("shared", I=72, O=24, B=1, H=13, W=9)
    given = case.inputs(torch.float32)
    found = []
    for processors in (1, 3, 3, 100):
        monkeypatch.setattr(conv1x1_arguments, "INTERPRETED_PROCESSORS", processors)
        found.append(results(case, given))
        check_moments(given)
    assert all(map(torch.equal, found[1], found[2]))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
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
        assert signs.shape == (0,)


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
        found, sums = moments_gradient(*(given.get(name) for name in names))
    x, h = given["x"].double(), activated(given)
    weight = given["weight"].to(dtype).double()
    size = given["square"].abs().max().clamp_min(1e-30)
    square = (given["square"] / size).to(dtype).double() * size.double()
    dh = torch.einsum("oi,bohw->bihw", weight, given["grad"].double())
    dh = dh + torch.einsum("ij,bjhw->bihw", square, h) + by_channel(given["shift"])
    tolerance = TOLERANCES[dtype]
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    if "scale" not in given:
        assert relative_error(found.double(), dh) < tolerance
        assert sums.shape == (0,)
        return
    dh = torch.where(by_channel(given["scale"]) * x + by_channel(given["bias"]) > 0, dh, 0.0)
    expected = torch.stack([dh.sum((0, 2, 3)), (dh * x).sum((0, 2, 3))])
    assert relative_error(found.double(), dh * by_channel(given["scale"])) < tolerance
    assert relative_error(sums.double(), expected) < tolerance


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
    found = []
    for y in (given["x"].flip(0), None):
        with guarded_memory():
            found.append(
                conv1x1_launch.join_input_gradient(
                    given["grad"], None, joined, packed if signs else None, y, *arguments
                )
            )
    (gradient, sums, moved), (alone, fewer, also_moved) = found
    assert torch.equal(gradient, alone)
    assert torch.equal(moved, also_moved)
    assert torch.equal(sums[[0, 2]] if mapped else sums[:1], fewer)
    assert relative_error(fewer[0].double(), gradient.double().sum((0, 2, 3))) < 1e-6


def test_a_weight_gradient_that_is_not_rounded() -> None:
    given = Case("weight", I=24, O=40).inputs(torch.float16)
    grad, x, weight = given["grad"], given["x"], given["weight"]
    exact = torch.einsum("bohw,bihw->oi", grad.double(), x.double())[:, :, None, None]
    rounded = conv1x1_launch.weight_gradient(grad, x, weight, None, None)
    wide = conv1x1_launch.weight_gradient(grad, x, weight, None, None, torch.float32)
    assert (rounded.dtype, wide.dtype) == (torch.float16, torch.float32)
    assert relative_error(wide.double(), exact) < 1e-6
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
    assert all(map(torch.equal, results(case, given), expected))


@pytest.mark.parametrize("allowed", [False, True])
def test_moments_are_never_plain_tf32(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounding would be seen in small variances; everything else may have it."""
    rows: list[LaunchRow] = []
    monkeypatch.setattr(LaunchRow, "launch", lambda row, *_: rows.append(row))
    monkeypatch.setattr(conv1x1_arguments, "tf32_allowed", lambda: allowed)
    results(Case("tf32"), Case("tf32").inputs(torch.float32))
    found = {row.kernel.partition(":")[2]: dict(row.constexprs)["PRECISION"] for row in rows}
    assert found == {
        "activation_moments": "tf32x3" if allowed else "ieee",
        "product_join": "tf32" if allowed else "ieee",
        "moments_input_gradient": "tf32" if allowed else "ieee",
    }


def test_moments_past_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tiles, whole and in part, of a map in memory full of holes, which are zeros."""
    channels, variant = 1024, ProductVariant("fp16", arch="cpu")
    tile = product_join_configs.moments_tile(channels, variant)
    blocks = product_join_configs.moments_blocks(channels, tile)
    whole = 2**31 // (tile.k * channels) + 1
    pixels = whole * tile.k + 5
    x = Holes(pixels * channels, torch.float16)
    # As many shares as tiles.
    partial = Holes((whole + 1) * channels**2, torch.float32)
    sums = Holes((whole + 1) * 2 * channels, torch.float32)
    values = torch.rand(tile.k + 5, channels, generator=torch.Generator().manual_seed(0)).half()
    x.at((pixels - len(values)) * channels, values.numel())[:] = values.flatten()
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(
        builder,
        "set_grid_dim",
        lambda *_: setattr(builder, "grid_dim", ((whole + 1) * blocks, 1, 1)),
    )
    for share, rows in ((whole - 1, values[: tile.k]), (whole, values[tile.k :])):
        place = (share * blocks, 0, 0)
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda *_, place=place: setattr(builder, "grid_idx", place)
        )
        product_join_configs.moments(channels, variant).launch(
            (1,), partial.at(0), sums.at(0), x.at(0), None, None, pixels
        )
        a = rows[:, : tile.n].double()
        for n in range(2):
            found = sums.at((2 * share + n) * channels, tile.n)
            assert relative_error(found.double(), a.sum(0)) < 1e-6
        found = partial.at(share * channels**2, channels * tile.n).view(tile.n, channels)
        assert relative_error(found[:, : tile.n].double(), a.T @ a) < 1e-6


def test_sizes_name_the_steps_of_both_products() -> None:
    """A weight that stays with its program has a square that does."""
    variant = ProductVariant("bf16")
    for inputs, outputs, steps in ((128, 256, (256, 128)), (256, 512, (64, 64)), (16, 8, (16, 16))):
        row = product_join_configs.moments_gradient(ProductSizes(inputs, outputs), variant)
        sizes = dict(row.constexprs)
        assert (sizes["BLOCK_K"], sizes["BLOCK_H"]) == steps
        single = product_join_configs.moments_gradient(
            ProductSizes(inputs, outputs), replace(variant, dtype="fp32")
        )
        assert dict(single.constexprs)["BLOCK_H"] <= 32
