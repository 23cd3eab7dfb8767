"""The Gram form against the definition: values, gradients, dead samples, dtypes, compilation."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from support.cases.coded import CASES, Case, outputs_and_gradients
from support.helpers import TOLERANCES, relative_error

from coded_resnext.kernels import coded_aggregate
from coded_resnext.kernels.coded.gram import branch_grams
from coded_resnext.kernels.coded.reference import branch_outputs

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cases
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_the_float64_definition(case: Case, dtype: torch.dtype) -> None:
    actual = outputs_and_gradients(case, dtype, "torch", dtype)
    expected = outputs_and_gradients(case, torch.float64, "reference", dtype)
    assert actual["y"].dtype == dtype
    assert actual["energies"].dtype == (dtype if dtype == torch.float64 else torch.float32)
    errors = {name: relative_error(actual[name].double(), expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCES[dtype], errors


@cases
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(case: Case, backend: str) -> None:
    small = replace(case, B=min(case.B, 2), C=4, H=min(case.H, 3), W=min(case.W, 2))
    h, weight = (value.contiguous().requires_grad_() for value in small.inputs(torch.float64))

    def call(h: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return coded_aggregate(
            small.lay_out(h), weight, small.N, backend=backend, **small.options()
        )

    assert torch.autograd.gradcheck(call, (h, weight))


def test_grams_are_those_of_the_branches() -> None:
    case = Case("grams", layout="channels_last", H=3, W=5)
    h, _ = case.inputs(torch.float64)
    columns = h.reshape(case.B, case.N, case.D, -1)
    expected = torch.einsum("bnip,bnjp->bnij", columns, columns)
    for layout in (h, h.contiguous()):
        assert relative_error(branch_grams(layout, case.N), expected) < 1e-14


def test_layout_is_kept() -> None:
    case = Case("layout", layout="channels_last", H=5, W=3)
    h, weight = case.inputs(torch.float32)
    h.requires_grad_()
    y, _ = coded_aggregate(h, weight, case.N, backend="torch")
    (grad,) = torch.autograd.grad(y.sum(), h)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dead_sample_gives_exact_zeros(dtype: torch.dtype, backend: str) -> None:
    """M <= 1e-24: y, energies and gradients of that sample are 0, and only of that one."""
    case = Case("dead", B=3, drop=True)
    h, weight = case.inputs(dtype)
    h[1] = 0
    h, weight = h.requires_grad_(), weight.requires_grad_()
    y, energies = coded_aggregate(h, weight, case.N, backend=backend, **case.masks())
    (y.float().sum() + energies[:, 0].sum()).backward()
    for value in (y, energies, h.grad):
        assert value.isfinite().all()
        assert (value[1] == 0).all()
        assert (value[0] != 0).any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_sample_without_a_kept_branch_is_dead(backend: str) -> None:
    case = Case("nothing_kept")
    h, weight = case.inputs(torch.float64)
    keep = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    y, energies = coded_aggregate(h, weight, case.N, keep_mask=keep, backend=backend)
    assert (y[0] == 0).all()
    assert energies.sum(1).tolist() == pytest.approx([0, case.N, case.N])
    # A single kept branch holds all the energy, divided by the original number of branches.
    assert energies[1].tolist() == pytest.approx([case.N, 0, 0, 0])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("magnitude", "is_dead"), [(1e-13, True), (1e-10, False), (1e4, False)], ids=str
)
def test_extreme_magnitudes_stay_finite_in_float32(
    magnitude: float, is_dead: bool, backend: str
) -> None:
    case = Case("extreme")
    h, weight = case.inputs(torch.float32)
    h = (h * magnitude).requires_grad_()
    y, energies = coded_aggregate(h, weight, case.N, backend=backend)
    (y.sum() + energies.pow(2).sum()).backward()
    assert y.isfinite().all()
    assert h.grad.isfinite().all()
    assert bool((energies == 0).all()) == is_dead


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_nan_is_not_taken_for_a_dead_sample(backend: str) -> None:
    case = Case("nan")
    h, weight = case.inputs(torch.float32)
    h[0, 0, 0, 0] = float("nan")
    y, energies = coded_aggregate(h, weight, case.N, backend=backend)
    assert y[0].isnan().any()
    assert energies[0].isnan().any()
    assert y[1:].isfinite().all()


def test_energies_stay_float32_under_autocast() -> None:
    case = Case("autocast", H=8, W=8)
    h, weight = case.inputs(torch.float32)
    rounded = h.bfloat16()
    _, expected = coded_aggregate(rounded.double(), weight.double(), case.N, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        y, energies = coded_aggregate(rounded, weight, case.N, backend="torch")
    assert y.dtype == torch.bfloat16
    assert energies.dtype == torch.float32
    # Far below bfloat16's 4e-3: nothing between the activations and the energies was rounded to it.
    assert relative_error(energies.double(), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_whole(layout: str, dtype: torch.dtype) -> None:
    case = Case("compiled", layout=layout, drop=True)
    h, weight = (value.requires_grad_() for value in case.inputs(dtype))

    def loss(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, energies = coded_aggregate(h, weight, case.N, backend="torch", **case.masks())
        return y.square().mean() + energies.pow(3).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(h, weight), (h, weight))
    actual = torch.autograd.grad(compiled(h, weight), (h, weight))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < (1e-13 if dtype == torch.float64 else 1e-2)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_by_inductor_equals_eager() -> None:
    case = Case("inductor", drop=True, H=5, W=3)
    h, weight = (value.requires_grad_() for value in case.inputs(torch.float32))

    def loss(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, energies = coded_aggregate(h, weight, case.N, backend="torch", **case.masks())
        return y.square().mean() + energies.pow(3).mean()

    expected = torch.autograd.grad(loss(h, weight), (h, weight))
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(h, weight), (h, weight)), expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_branch_tensor_is_never_formed() -> None:
    """The largest tensor kept for the backward pass is the activation, not N times the output."""
    case = Case("memory", B=2, N=8, D=4, C=64, H=8, W=8)
    h, weight = (value.requires_grad_() for value in case.inputs(torch.float32))
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        coded_aggregate(h, weight, case.N, backend="torch")
    assert max(kept) == h.numel()
    assert branch_outputs(h, torch.zeros(case.N, case.C, case.D)).numel() == 16 * h.numel()
