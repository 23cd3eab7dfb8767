"""A NaN or an infinity in one branch of one sample stays in that branch's energy.

Kernels take several branches at once and multiply by zeros between them, and 0 times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from support.helpers import TOLERANCES, relative_error
from torch import Tensor

from coded_resnext.kernels import branch_energy, coded_aggregate
from coded_resnext.kernels.coded import gram
from coded_resnext.kernels.coded import reference as coded_reference
from coded_resnext.kernels.coded.operator import normalize_branches
from coded_resnext.kernels.evaluation import folded_grouped_conv3x3
from coded_resnext.kernels.rows import Passes

# Branches of which four share a window, of which two do not fill it, and of which one does.
SIZES = [(4, 4), (3, 6), (2, 16)]
FORWARD = Passes(forward=True).encoded()
SPECIAL = [float("nan"), float("inf"), -float("inf")]


# Of `h [B, N*D, H, W]`, the weight of the expand convolution, and N; with and without Triton.
FORMS: dict[str, Callable[[Tensor, Tensor, int, str], Tensor]] = {
    "branch_energy": lambda h, w, n, backend: branch_energy(h, w, n, backend=backend),
    "affine": lambda h, w, n, backend: branch_energy(
        h, w, n, scale=torch.ones(h.shape[1]), bias=torch.zeros(h.shape[1]), backend=backend
    ),
    "keep_mask": lambda h, w, n, backend: branch_energy(
        h, w, n, keep_mask=torch.ones(len(h), n), backend=backend
    ),
}


def one_bad_number(
    branches: int, width: int, value: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Activations `[3, N*D, 3, 2]` with `value` in the last channel of the first branch of sample
    1, and a weight `[8, N*D, 1, 1]`."""
    generator = torch.Generator().manual_seed(branches * width)
    h = torch.randn(3, branches * width, 3, 2, generator=generator).relu()
    h[1, width - 1, 2, 1] = value
    weight = torch.randn(8, branches * width, 1, 1, generator=generator)
    return h.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype)


def check_alone(energies: Tensor, expected: Tensor, tolerance: float) -> None:
    """Energies are not finite where those of the definition are not, and equal elsewhere.

    An infinity of the definition may be NaN: the Gram form subtracts infinities.
    """
    assert energies.isfinite().tolist() == expected.isfinite().tolist()
    finite = expected.isfinite()
    assert relative_error(energies[finite].double(), expected[finite]) < tolerance


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_it_stays_in_its_energy(form: str, backend: str, device: torch.device) -> None:
    # A ReLU takes away what is below 0.
    values = SPECIAL[:2] if form == "affine" else SPECIAL
    for value, (branches, width) in product(values, SIZES):
        h, weight = one_bad_number(branches, width, value, torch.float32)
        energies = FORMS[form](h.to(device), weight.to(device), branches, backend).cpu()
        expected = branch_energy(h.double(), weight.double(), branches, backend="reference")
        bad = expected.isfinite().logical_not().nonzero().tolist()
        assert bad == [[1, 0]], "the definition itself"
        check_alone(energies, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", SPECIAL)
def test_in_half_precision(value: float, dtype: torch.dtype, device: torch.device) -> None:
    h, weight = one_bad_number(4, 4, value, dtype)
    energies = FORMS["branch_energy"](h.to(device), weight.to(device), 4, "triton").cpu()
    expected = branch_energy(h.double(), weight.double(), 4, backend="reference")
    check_alone(energies, expected, 1e-5)


@pytest.mark.parametrize("kernels", [True, False], ids=["interpreter", "gram"])
@pytest.mark.parametrize("value", SPECIAL)
def test_it_stays_in_its_sample(
    value: float, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is divided by the mean energy of a sample is lost with it, and no other sample is."""
    reason = None if kernels else "PyTorch's"
    monkeypatch.setattr("coded_resnext.kernels.coded.operator.unsupported", lambda *_: reason)
    for branches, width in SIZES:
        h, weight = one_bad_number(branches, width, value, torch.float32)
        per_branch = gram.split_weight(weight, branches, concatenate=False)
        scaled, normalized, inverse = normalize_branches(h, per_branch, None, None, None, None)
        assert not inverse[1] > 0
        assert not normalized[1].isfinite().all()
        assert not scaled[1].isfinite().all()
        others = torch.tensor([0, 2])
        wide = h[others].double(), weight.double()
        _, expected = coded_aggregate(*wide, branches, backend="reference")
        assert relative_error(normalized[others].double(), expected) < 2e-6
        assert scaled[others].isfinite().all()


def bad_branch(
    width: int, dtype: torch.dtype, value: float
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Arguments of a folded convolution whose first branch has a bad number in its result, and the
    samples and branches where energies are not finite.

    A NaN comes from the weight, and an infinity from the activations of sample 1, in float16 alone:
    elsewhere no sum of the convolution is that large.
    """
    generator = torch.Generator().manual_seed(width)
    channels = 4 * width
    x = torch.rand(3, channels, 3, 3, generator=generator)
    weight = torch.rand(channels, width, 3, 3, generator=generator)
    if value == float("inf"):
        x[1, :width, 1, 1] = torch.finfo(dtype).max
        bad = [[1, 0]]
    else:
        weight[width - 1, 0, 1, 1] = value
        bad = [[0, 0], [1, 0], [2, 0]]
    actual = {
        "x": x.to(dtype).contiguous(memory_format=torch.channels_last),
        "weight": weight.to(dtype),
        "bias": torch.randn(channels, generator=generator),
        "branch_weight": torch.randn(4, 24, width, generator=generator),
    }
    return actual, bad


@pytest.mark.parametrize("kernels", [FORWARD, 0], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, float("nan")),
        (torch.bfloat16, float("nan")),
        (torch.float16, float("inf")),
    ],
    ids=str,
)
def test_it_stays_in_its_energy_behind_a_convolution(
    dtype: torch.dtype, value: float, width: int, stride: int, kernels: int
) -> None:
    given, bad = bad_branch(width, dtype, value)
    x, weight, bias, branch_weight = given.values()
    h, energies = folded_grouped_conv3x3(x, weight, bias, branch_weight, None, stride, kernels)
    assert not h[bad[0][0], :width].isfinite().all()
    assert h[:, width:].isfinite().all()
    expected = coded_reference.branch_energy(h.double(), branch_weight.double())
    assert expected.isfinite().logical_not().nonzero().tolist() == bad
    check_alone(energies, expected, 2**-17 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinite_energy_is_not_taken_for_a_rounded_one(sign: float) -> None:
    """Infinity times a form of either sign beside it: a sum of minus infinity is not 0."""
    given, _ = bad_branch(4, torch.float16, float("inf"))
    x, weight, bias, branch_weight = given.values()
    # Of the two channels that the sum is of, the first is infinite and its own part is small.
    branch_weight[:] = 0.0
    branch_weight[0, 0, :2] = torch.tensor([0.001, sign])
    weight[:] = 0.0
    weight[0] = 1.0
    bias[1] = 60000.0
    h, energies = folded_grouped_conv3x3(x, weight, bias, branch_weight, None, 1, FORWARD)
    assert h[1, 0].isinf().any()
    assert not energies[1, 0].isfinite()
    assert energies[0, 0].isfinite()
