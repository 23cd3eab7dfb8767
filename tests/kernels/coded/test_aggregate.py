"""The coded aggregation by the kernels against the float64 definition, on named odd cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases.coded import CASES, KERNEL_CASES, Case, outputs_and_gradients
from support.helpers import TOLERANCES, relative_error
from support.holes import Holes
from torch import Tensor
from triton.runtime import interpreter

from coded_resnext.kernels import coded_aggregate, rows
from coded_resnext.kernels.coded import operator as coded_operator
from coded_resnext.kernels.coded import rows as coded_rows

HALF = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("memory")


def check(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    actual = outputs_and_gradients(case, dtype, "triton", dtype, str(device))
    expected = outputs_and_gradients(case, torch.float64, "reference", dtype)
    eager = outputs_and_gradients(case, dtype, "torch", dtype)
    assert actual["y"].dtype == dtype
    assert actual["energies"].dtype == torch.float32
    for name, value in expected.items():
        error = relative_error(actual[name].cpu().double(), value)
        assert error < TOLERANCES[dtype], name
        # Twice the error of PyTorch in the same dtype; where that happens to have none, a few
        # roundings of the dtype.
        limit = 2 * relative_error(eager[name].double(), value) + 2 * torch.finfo(dtype).eps
        assert error <= limit, name


@pytest.mark.parametrize("case", [*CASES, *KERNEL_CASES], ids=lambda case: case.name)
def test_float32_equals_the_definition(case: Case, device: torch.device) -> None:
    check(case, torch.float32, device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_half_precision_equals_the_definition(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    check(case, dtype, device)


def with_affine(z: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, case: Case) -> Any:
    """`s h`, `Ebar` and the gradients of all four inputs for `h = relu(scale z + bias)`."""
    leaves = [value.clone().requires_grad_() for value in (z, weight, scale, bias)]
    masks = {name: mask.to(weight) for name, mask in case.masks().items()}
    scaled, energies, _ = coded_operator.normalize_branches(
        *leaves, masks.get("drop_mask"), masks.get("keep_mask")
    )
    grads = [like_normal(value, seed) for seed, value in enumerate((scaled, energies))]
    return scaled, energies, *torch.autograd.grad((scaled, energies), leaves, grads)


def like_normal(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=generator).bfloat16().to(value)


@pytest.mark.parametrize(
    "case",
    [
        Case("odd_map", B=2, N=3, D=16, H=5, W=5, layout="channels_last", drop=True, keep=True),
        Case("padded_windows", N=5, D=6, H=3, W=7, drop=True),
        Case("even_map", B=2, N=4, D=4, H=4, W=4, layout="channels_last"),
    ],
    ids=lambda case: case.name,
)
def test_affine_map_and_relu_ride_along(case: Case, device: torch.device) -> None:
    """BatchNorm's map in the prologue; its gradients are the sums for the BatchNorm behind."""
    generator = torch.Generator().manual_seed(2)
    channels = case.N * case.D
    z = case.lay_out(torch.randn(case.B, channels, case.H, case.W, generator=generator))
    weight = torch.randn(case.N, case.C, case.D, generator=generator)
    scale = torch.randn(channels, generator=generator)
    bias = torch.randn(channels, generator=generator) * 0.5
    inputs = [z, weight, scale, bias]
    actual = with_affine(*[value.to(device) for value in inputs], case)
    # float64 runs the Gram form of h = relu(scale z + bias), with PyTorch's own map and ReLU.
    expected = with_affine(*[value.double() for value in inputs], case)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a.cpu().double(), b) < TOLERANCES[torch.float32]


def test_gradients_of_the_affine_map_are_those_of_autograd() -> None:
    """The expected values of the test above, against autograd through the map and the ReLU."""
    case = Case("autograd", B=2, N=3, D=4, drop=True)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 12, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    scale, bias = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    actual = with_affine(z, weight, scale, bias, case)
    leaves = [value.clone().requires_grad_() for value in (z, weight, scale, bias)]
    h = torch.relu(leaves[0] * leaves[2][:, None, None] + leaves[3][:, None, None])
    scaled, energies, _ = coded_operator.normalize_branches(
        h, leaves[1], None, None, case.masks()["drop_mask"].double(), None
    )
    grads = [like_normal(value, seed) for seed, value in enumerate((scaled, energies))]
    expected = torch.autograd.grad((scaled, energies), leaves, grads)
    for a, b in zip(actual[2:], expected, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dead_sample_gives_exact_zeros(dtype: torch.dtype, device: torch.device) -> None:
    case = Case("dead", B=3, drop=True)
    h, weight = (value.to(device) for value in case.inputs(dtype))
    h[1] = 0
    h, weight = h.requires_grad_(), weight.requires_grad_()
    y, energies = coded_aggregate(h, weight, case.N, backend="triton", **case.masks())
    (y.float().sum() + energies[:, 0].sum()).backward()
    for value in (y, energies, h.grad):
        assert value.isfinite().all()
        assert (value[1] == 0).all()
        assert (value[0] != 0).any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(("magnitude", "dead"), [(1e-13, True), (1e-10, False), (1e4, False)])
def test_extreme_magnitudes_stay_finite(magnitude: float, dead: bool, device: torch.device) -> None:
    case = Case("extreme")
    h, weight = (value.to(device) for value in case.inputs(torch.float32))
    h = (h * magnitude).requires_grad_()
    y, energies = coded_aggregate(h, weight, case.N, backend="triton")
    (y.sum() + energies.pow(2).sum()).backward()
    assert y.isfinite().all()
    assert h.grad.isfinite().all()
    assert bool((energies == 0).all()) == dead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_is_not_taken_for_a_dead_sample(dtype: torch.dtype, device: torch.device) -> None:
    case = Case("nan")
    h, weight = (value.to(device) for value in case.inputs(dtype))
    h[0, 0, 0, 0] = float("nan")
    y, energies = coded_aggregate(h, weight, case.N, backend="triton")
    assert y[0].isnan().any()
    assert energies[0].isnan().all()
    assert y[1:].isfinite().all()


def test_callers_tensors_are_left_alone_and_repeats_are_bit_equal(device: torch.device) -> None:
    case = KERNEL_CASES[3]
    h, weight = (value.to(device) for value in case.inputs(torch.bfloat16))
    masks = {name: mask.to(device) for name, mask in case.masks().items()}
    before = [value.clone() for value in (h, weight, *masks.values())]
    results = []
    for _ in range(2):
        leaves = [h.detach().requires_grad_(), weight.detach().requires_grad_()]
        y, energies = coded_aggregate(*leaves, case.N, backend="triton", **masks)
        grads = torch.autograd.grad((y.float().square().sum() + energies.pow(3).sum()), leaves)
        results.append((y, energies, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for value, old in zip((h, weight, *masks.values()), before, strict=True):
        assert torch.equal(value, old)


def test_the_kernels_run_and_take_the_row_of_their_sizes(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Not the Gram form in their place; every launch fits the arguments that its row states."""
    launched = []
    real = rows.LaunchRow.launch
    words = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}

    def noted(row: rows.LaunchRow, grid: tuple[int, ...], *args: Any) -> None:
        launched.append(row.kernel)
        assert len(args) == len(row.args)
        for stated, given in zip(row.args, args, strict=True):
            if isinstance(stated, str) or stated is None:
                assert stated == (words[given.dtype] if given is not None else None), row
            else:
                assert type(stated) is type(given), row
        real(row, grid, *args)

    monkeypatch.setattr(rows.LaunchRow, "launch", noted)
    outputs_and_gradients(KERNEL_CASES[1], torch.bfloat16, "triton", torch.bfloat16, str(device))
    assert launched == [
        "coded.aggregate:aggregate_forward",
        "coded.aggregate:aggregate_backward",
        "coded.energy:weighted_gram",
    ]


def test_energies_stay_float32_under_autocast(device: torch.device) -> None:
    case = Case("autocast", H=8, W=8)
    h, weight = (value.to(device) for value in case.inputs(torch.float32))
    rounded = h.bfloat16()
    _, expected = coded_aggregate(rounded.double(), weight.double(), case.N, backend="reference")
    with torch.autocast(device.type, torch.bfloat16):
        y, energies = coded_aggregate(rounded, weight, case.N, backend="triton")
    assert y.dtype == torch.bfloat16
    assert relative_error(energies.double(), expected) < 1e-6


@pytest.mark.parametrize("kernel", ["aggregate_forward", "aggregate_backward"])
def test_offsets_past_two_to_the_31st_elements(
    kernel: str, monkeypatch: pytest.MonkeyPatch, memory: Any
) -> None:
    """Program 2^20 reads and writes what program 0 does, 2^31 elements further on."""
    memory.empty((1,), torch.float32)
    sizes = rows.CodedSizes(branches=4, width=8, channels=8, pixels=64)
    activations, sample = 4 * 8 * 64, 2**20
    assert sample * activations == 2**31
    row = getattr(coded_rows, kernel)(sizes, rows.Variant("fp16", arch="cpu"))
    generator = torch.Generator().manual_seed(0)
    builder = interpreter.interpreter_builder
    form = torch.rand(4 * 8 * 8, generator=generator)
    # Elements of a sample in each argument, in the order of the row; None for other arguments.
    if kernel == "aggregate_forward":
        counts = [activations, 4, 1, 4, activations, None, None, None, None, None, None]
        written = (0, 1, 2, 3)
    else:
        counts = [activations, None, 4, activations, activations, *[None] * 5, 4, 1, 4, None]
        written = (0, 2)
    others = [form if word == "*fp32" else word for word in row.args]
    results = []
    memories = [
        count and Holes((sample + 1) * count, torch.float16 if word == "*fp16" else torch.float32)
        for count, word in zip(counts, row.args, strict=True)
    ]
    for number in (0, sample):
        generator.manual_seed(1)
        args = []
        for hole, count, other in zip(memories, counts, others, strict=True):
            if hole:
                hole.at(number * count, count)[:] = torch.rand(count, generator=generator)
            args.append(hole.at(0) if hole else other)
        with monkeypatch.context() as patch:
            patch.setattr(
                builder,
                "set_grid_idx",
                lambda x, y, z, number=number: setattr(builder, "grid_idx", (number, y, z)),
            )
            row.launch((1,), *args)
        results.append([memories[i].at(number * counts[i], counts[i]).clone() for i in written])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        # The interpreter runs the same steps on the same numbers.
        assert torch.equal(a, b)
    assert (results[0][0] != 0).any()


@pytest.mark.parametrize(("scale", "channels"), [(2.0**-10, 6), (45.0, 64)], ids=["tiny", "huge"])
@pytest.mark.parametrize("case", KERNEL_CASES[:3], ids=lambda case: case.name)
def test_float16_takes_weights_of_any_size(
    case: Case, scale: float, channels: int, device: torch.device
) -> None:
    """apex#402, triton#8908: sums of squares over the channels left the range of float16."""
    h, weight = replace(case, C=channels).inputs(torch.float32)
    weight = (scale * weight / weight.square().mean().sqrt()).half()
    h = h.half()

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        leaf = h.to(dtype).requires_grad_()
        arguments = (leaf, weight.to(dtype), case.N)
        energies = coded_aggregate(*arguments, backend=backend, **case.masks())[1]
        return torch.autograd.grad(energies.square().sum(), leaf)[0].double()

    expected = gradient("reference", torch.float64)
    # Two 16-bit roundings of each factor of a product.
    assert relative_error(gradient("triton", torch.float16), expected) < TOLERANCES[torch.float16]
