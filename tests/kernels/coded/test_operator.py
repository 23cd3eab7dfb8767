"""The operators' schemas, fakes and gradients, and whole graphs of the compiler, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases.coded import Case
from support.helpers import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coded_resnext.kernels import coded_aggregate, coding_losses, layout
from coded_resnext.kernels.coded.operator import branch_energy, normalize_branches
from coded_resnext.kernels.loss.functional import coding_loss_operator


def arguments(affine: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return {
        "z": normal(2, 12, 3, 3),
        "branch_weight": normal(4, 5, 3),
        "scale": normal(12) if affine else None,
        "bias": normal(12) if affine else None,
        "mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]], dtype=dtype),
    }


@pytest.mark.parametrize(
    "kernels", [True, pytest.param(False, marks=pytest.mark.long)], ids=["interpreter", "gram"]
)
@pytest.mark.parametrize("affine", [pytest.param(False, marks=pytest.mark.long), True])
def test_opcheck(affine: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(layout, "interpreted", lambda: False)
        monkeypatch.setattr("coded_resnext.kernels.loss.functional.interpreted", lambda: False)
    z, weight, scale, bias, mask = arguments(affine).values()
    torch.library.opcheck(branch_energy, (z, weight, scale, bias, mask))
    torch.library.opcheck(normalize_branches, (z, weight, scale, bias, mask, None))
    energies = torch.rand(2, 3, 4, requires_grad=True)
    books = torch.eye(4, dtype=torch.bool).expand(2, 4, 4).contiguous()
    targets = torch.tensor([0, 3, 1])
    torch.library.opcheck(
        coding_loss_operator, (energies, books, targets, torch.ones(3), 4.0, 0.1, True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_whole(layout: str, dtype: torch.dtype) -> None:
    case = Case("compiled", B=2, layout=layout, drop=True)
    h, weight = (value.requires_grad_() for value in case.inputs(dtype))
    books = [torch.eye(4, dtype=torch.bool)]

    def loss(h: Tensor, weight: Tensor) -> Tensor:
        y, energies = coded_aggregate(h, weight, case.N, backend="triton", **case.masks())
        coding = coding_losses([energies], books, torch.tensor([0, 3]), backend="triton")
        return y.square().mean() + coding.losses[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(h, weight), (h, weight))
    actual = torch.autograd.grad(compiled(h, weight), (h, weight))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kernel", [True, False], ids=["interpreter", "torch"])
@pytest.mark.parametrize("label", [-1, 10, -(2**40)])
def test_the_operator_reads_no_label_that_is_no_class(
    label: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytorch#135546: -1 read what lay before the codewords, 10 of ten the next block's first."""
    monkeypatch.setattr("coded_resnext.kernels.loss.functional.interpreted", lambda: kernel)
    codewords = torch.eye(10, dtype=torch.bool).expand(2, 10, 10).contiguous()
    energies = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0))
    targets, shares = torch.tensor([4, label, 9]), torch.tensor([0.5, 0.25, 0.25])
    losses, grads, _ = coding_loss_operator(energies, codewords, targets, shares, 4.0, 0.0, False)
    assert losses.isnan().all()
    assert grads[:, 1].isnan().all()
    assert grads[:, ::2].isfinite().all()
    shares[1] = 0.0
    losses, grads, _ = coding_loss_operator(energies, codewords, targets, shares, 4.0, 0.0, False)
    assert losses.isfinite().all()
    assert not grads[:, 1].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("aggregation", ["sum", "concat"])
def test_the_branch_sum_is_a_matrix_product(backend: str, aggregation: str) -> None:
    """Of float32 it is exact by default, where convolutions round to TF32 on a GPU."""
    case = Case("product", concat=aggregation == "concat")
    h, weight = case.inputs(torch.float32)
    called = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), keywords=None):  # type: ignore[no-untyped-def]
            called.append(operator.overloadpacket)
            return operator(*args, **(keywords or {}))

    with Recorded():
        coded_aggregate(h, weight, case.N, aggregation=aggregation, backend=backend)
    assert torch.ops.aten.convolution not in called
    assert {torch.ops.aten.mm, torch.ops.aten.bmm} & set(called)
