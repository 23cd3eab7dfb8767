"""Derivatives beyond one backward pass, autocast and checkpoints around the coded operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases.coded import Case
from support.helpers import relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from coded_resnext.kernels import branch_energy, coded_aggregate, coding_loss

CASE = Case("transforms", B=3, N=4, D=3, C=5, H=3, W=2, drop=True, keep=True)
TARGETS = torch.tensor([0, 3, 1])
CODEWORDS = torch.eye(4, dtype=torch.bool)


def objective(h: Tensor, weight: Tensor, backend: str = "torch") -> Tensor:
    """All three operations in one number."""
    y, energies = coded_aggregate(h, weight, CASE.N, backend=backend, **CASE.masks())
    raw = branch_energy(h, weight, CASE.N, backend=backend)
    loss = coding_loss(energies, CODEWORDS, TARGETS, exponent=3.0, backend=backend)
    return y.square().mean() + raw.square().mean() + loss


def inputs(layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    return replace(CASE, layout=layout).inputs(torch.float64)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_single_samples_by_vmap(layout: str) -> None:
    """The function vmap over grad gives what one sample at a time gives."""
    h, weight = inputs(layout)

    def of_one(weight: Tensor, sample: Tensor, target: Tensor) -> Tensor:
        y, energies = coded_aggregate(sample[None], weight, CASE.N)
        raw = branch_energy(sample[None], weight, CASE.N)
        return y.square().sum() + raw.sum() + coding_loss(energies, CODEWORDS, target[None])

    at_once = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(weight, h, TARGETS)
    leaf = weight.clone().requires_grad_()
    for sample, target, gradient in zip(h, TARGETS, at_once, strict=True):
        (alone,) = torch.autograd.grad(of_one(leaf, sample, target), leaf)
        assert relative_error(gradient, alone) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_derivatives_equal_finite_differences(layout: str) -> None:
    h, weight = (value.requires_grad_() for value in inputs(layout))
    assert torch.autograd.gradgradcheck(objective, (h, weight))


def test_forward_mode_equals_reverse_mode() -> None:
    h, weight = inputs()
    tangents = tuple(torch.randn_like(value) for value in (h, weight))
    gradients = torch.func.grad(objective, (0, 1))(h, weight)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    _, by_function = torch.func.jvp(objective, (h, weight), tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, t) for v, t in zip((h, weight), tangents, strict=True)]
        by_duals = forward_ad.unpack_dual(objective(*duals)).tangent
    assert relative_error(by_function, expected) < 1e-12
    assert relative_error(by_duals, expected) < 1e-12


def test_jacobian_by_vmap_over_backward() -> None:
    h, weight = inputs()

    def energies(weight: Tensor) -> Tensor:
        return coded_aggregate(h, weight, CASE.N)[1]

    by_function = torch.func.jacrev(energies)(weight)
    assert relative_error(by_function, torch.autograd.functional.jacobian(energies, weight)) < 1e-12


@pytest.mark.parametrize("operation", ["aggregate", "energy", "loss"])
@pytest.mark.parametrize("how", ["vmap", "jvp", "dual", "twice"])
def test_kernels_refuse_what_they_cannot_differentiate(how: str, operation: str) -> None:
    h, weight = (value.float() for value in inputs())

    def call(h: Tensor) -> Tensor:
        if operation == "loss":
            energies = h.mean((2, 3)).unflatten(1, (4, 3)).mean(2)
            return coding_loss(energies, CODEWORDS, TARGETS, backend="triton")
        if operation == "energy":
            return branch_energy(h, weight, CASE.N, backend="triton").sum()
        return coded_aggregate(h, weight, CASE.N, backend="triton")[1].square().sum()

    def differentiate() -> None:
        if how == "vmap":
            torch.func.vmap(call)(h[None])
        elif how == "jvp":
            torch.func.jvp(call, (h,), (h,))
        elif how == "dual":
            with forward_ad.dual_level():
                call(forward_ad.make_dual(h, h))
        else:
            h.requires_grad_()
            (gradient,) = torch.autograd.grad(call(h), h, create_graph=True)
            gradient.square().sum().backward()

    with pytest.raises(NotImplementedError, match='backend="torch"'):
        differentiate()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_checkpoints_without_reentrance_give_the_plain_gradients(backend: str) -> None:
    """pytorch#82156, mamba#909: every saved tensor is unpacked once."""
    results = []
    for wrapped in (False, True):
        h, weight = (value.float().requires_grad_() for value in inputs())
        if wrapped:
            total = checkpoint(objective, h, weight, backend, use_reentrant=False)
        else:
            total = objective(h, weight, backend=backend)
        results.append(torch.autograd.grad(total, (h, weight)))
    for plain, again in zip(*results, strict=True):
        assert relative_error(again, plain) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_autocast_rounds_no_energy(backend: str) -> None:
    """apex#973, apex#402: energies that float16 cannot hold, and their sums, stay float32."""
    h, weight = 10 * torch.ones(1, 8, 56, 56), 0.1 * torch.ones(6, 8, 1, 1)
    with torch.autocast("cpu", dtype=torch.float16):
        energy = branch_energy(h, weight, 4, backend=backend)
    assert energy.dtype == torch.float32
    assert relative_error(energy, torch.full((1, 4), 4.0)) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_rounds_no_gradient(backend: str) -> None:
    """pytorch#105682, pytorch#87979: a backward pass inside autocast is that outside."""

    def gradients(inside: bool) -> tuple[Tensor, ...]:
        h, weight = (value.float().requires_grad_() for value in inputs())
        _, energies = coded_aggregate(h, weight, CASE.N, backend=backend)
        raw = branch_energy(h, weight, CASE.N, backend=backend)
        soft = torch.eye(4)[TARGETS] * 0.7 + 0.075
        loss = raw.square().mean() + coding_loss(energies, CODEWORDS, soft, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, (h, weight))

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(inside, outside) < 1e-6
