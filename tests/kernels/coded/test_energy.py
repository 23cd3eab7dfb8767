"""Branch energies by the kernels against the float64 definition, alone and with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases.coded import KERNEL_CASES, Case
from support.helpers import TOLERANCES, relative_error
from support.holes import Holes
from torch import Tensor

from coded_resnext.kernels import branch_energy, rows
from coded_resnext.kernels.coded import rows as coded_rows

CASES = [
    *KERNEL_CASES,
    Case("one_branch", N=1, D=5),
    Case("one_pixel_one_sample", B=1, H=1, W=1),
    Case("sliced", layout="sliced"),
    Case("expanded", layout="expanded"),
]


def energies_and_gradients(
    case: Case, dtype: torch.dtype, like: torch.dtype, backend: str, device: Any, affine: bool
) -> list[Tensor]:
    h, weight = (v.to(dtype).to(device).requires_grad_() for v in case.inputs(like))
    leaves, maps = [h, weight], {}
    if affine:
        generator = torch.Generator().manual_seed(1)
        normal = torch.randn(2, case.N * case.D, generator=generator).to(device)
        scale, bias = (value.to(weight).float().requires_grad_() for value in normal)
        if dtype == torch.float64:
            scale, bias = (value.detach().double().requires_grad_() for value in (scale, bias))
        maps = {"scale": scale, "bias": bias}
        leaves += [scale, bias]
    keep = case.masks().get("keep_mask")
    energy = branch_energy(h, weight, case.N, keep_mask=keep, backend=backend, **maps)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(energy.shape, generator=generator).to(energy)
    return [energy, *torch.autograd.grad(energy, leaves, grad)]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_equals_the_definition(case: Case, affine: bool, device: torch.device) -> None:
    kinds = (torch.float32, "triton"), (torch.float64, "reference")
    actual, expected = (
        energies_and_gradients(case, dtype, torch.float32, backend, device, affine)
        for dtype, backend in kinds
    )
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a.double(), b) < TOLERANCES[torch.float32]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES[:6], ids=lambda case: case.name)
def test_half_precision_rounds_inputs_of_products_only(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    actual = energies_and_gradients(case, dtype, dtype, "triton", device, False)
    expected = energies_and_gradients(case, torch.float64, dtype, "reference", device, False)
    # Energies are float32 sums of exact products; no rounding to the dtype comes near them.
    assert relative_error(actual[0].double(), expected[0]) < TOLERANCES[torch.float32]
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert relative_error(a.double(), b) < TOLERANCES[dtype]


@pytest.mark.parametrize("kernel", ["energy_forward", "weighted_gram", "energy_backward"])
def test_offsets_past_two_to_the_31st_elements(kernel: str, device: torch.device) -> None:
    """The last sample begins 2^31 elements behind the first one, in memory full of holes.

    The grid covers the first window of every sample only, so that little of it is touched.
    """
    sizes = rows.CodedSizes(branches=2**22, width=16, channels=8, pixels=8)
    batch, channels = 5, sizes.branches * sizes.width
    last = (batch - 1) * sizes.pixels * channels
    assert last >= 2**31
    z = Holes(batch * sizes.pixels * channels, torch.float16)
    generator = torch.Generator().manual_seed(0)
    for pixel in range(sizes.pixels):
        z.at(last + pixel * channels, 16)[:] = torch.rand(16, generator=generator)
    pixels = range(last, last + sizes.pixels * channels, channels)
    h = torch.stack([z.at(offset, 16) for offset in pixels]).double()
    row = getattr(coded_rows, kernel)(sizes, rows.Variant("fp16", arch="cpu"))
    programs = -(-batch // dict(row.constexprs)["SAMPLES"])
    form, per_branch = (Holes(programs * sizes.branches * 256, torch.float32) for _ in range(2))
    form.at(0, 256)[:] = torch.eye(16).flatten()
    of_last = per_branch.at((batch - 1) * sizes.branches)
    if kernel == "energy_forward":
        row.launch(
            (programs, 1), per_branch.at(0), z.at(0), None, None, form.at(0, 256), None, 1.0, batch
        )
        actual, expected = of_last[0], h.square().sum()
    elif kernel == "weighted_gram":
        of_last[0] = 2
        row.launch((programs, 1), form.at(0), z.at(0), None, None, per_branch.at(0), batch)
        of_last = form.at((programs - 1) * sizes.branches * 256, 256)
        actual, expected = of_last, 2 * (h.T @ h).flatten()
    else:
        of_last[0] = 2
        grad = Holes(batch * sizes.pixels * channels, torch.float16)
        forms = form.at(0, 256)
        row.launch(
            (programs, 1), grad.at(0), None, z.at(0), None, None, forms, per_branch.at(0), batch
        )
        actual, expected = torch.stack([grad.at(offset, 16) for offset in pixels]), 2 * h
    assert relative_error(actual.double(), expected) < TOLERANCES[torch.float16]
