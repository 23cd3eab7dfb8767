"""The fused branch sum against the float64 definition, with everything that rides along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Case
from support.helpers import TOLERANCES, relative_error
from torch import Tensor

from coded_resnext.kernels import coded_expand

pytestmark = pytest.mark.usefixtures("memory")

CASES = [
    Case("several_samples_a_tile", B=5, N=2, D=16, H=5, W=5, layout="channels_last"),
    Case("several_tiles_a_sample", B=2, N=4, D=4, C=24, H=12, W=11, drop=True, keep=True),
    Case("branches_across_blocks", N=9, D=11, H=4, W=4, drop=True, layout="channels_last"),
    Case("removed_branches", B=2, N=6, D=4, H=3, W=5, keep=True),
    Case("one_branch_one_sample", B=1, N=1, D=5, C=3, H=3, W=2),
]


def everything(
    case: Case,
    dtype: torch.dtype,
    like: torch.dtype,
    backend: str,
    device: Any,
    options: dict[str, Any],
) -> list[Tensor]:
    """Results and gradients; a random gradient for each result."""
    options = dict(options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h, weight = case.inputs(like)
    leaves = [h.to(dtype).to(device), weight.to(wide).to(device)]
    generator = torch.Generator().manual_seed(1)
    normal = torch.rand(2, case.N * case.D, generator=generator).to(device, wide) - 0.4
    per_sample = (torch.rand(case.B, generator=generator) + 0.5).to(device, wide)
    names = ["h", "weight"]
    if options.pop("affine", False):
        leaves += [normal[0].clone(), normal[1].clone()]
        names += ["scale", "bias"]
    if options.pop("scaled", False):
        leaves.append(per_sample)
        names.append("factor")
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    arguments = dict(zip(names, leaves, strict=True))
    found = coded_expand(branches=case.N, backend=backend, **arguments, **options, **case.masks())
    results = [value for value in found if value is not None]
    grads = [torch.randn(v.shape, generator=generator).to(like).to(v) for v in results]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"scaled": True},
        {"affine": True, "moments": True, "energies": True},
        {"moments": True, "energies": True, "energies_from_tiles": True},
    ],
    ids=["scaled", "energies_apart", "energies_from_tiles"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition(
    case: Case, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    found = everything(case, dtype, dtype, "triton", device, options)
    expected = everything(case, torch.float64, dtype, "torch", device, options)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.double(), b) < TOLERANCES[dtype]
    if "energies" in options and "affine" not in options:
        # Tiles take energies with twice the digits of bfloat16 (2^-17).
        assert relative_error(found[2].double(), expected[2]) < 1e-5
