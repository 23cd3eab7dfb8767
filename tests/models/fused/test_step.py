"""A fused block as a node of autograd, and the operator that it is within a captured graph."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.cases.fused import CASES, BlockCase
from torch import Tensor

from coded_resnext.kernels import replay
from coded_resnext.models.fused import block as fused_block
from coded_resnext.models.fused import step
from coded_resnext.models.fused.data_flow import present

TRAINED = [case for case in CASES if case.train and not case.keep]


def calls_of(case: BlockCase, monkeypatch: pytest.MonkeyPatch) -> dict[str, step.Call]:
    """The arguments of a block's node and of its output's, in float64."""
    calls: dict[str, step.Call] = {}
    for name in ("fused_block", "fused_sum"):
        node = getattr(step, name)

        def note(
            call: step.Call, *tracked: object, name: str = name, node: object = node
        ) -> list[Tensor | None]:
            calls[name] = call
            return node(call, *tracked)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(step, name, note)
    block = case.make()
    block.backend = "fused"
    inputs = case.inputs()
    masks = {k: v.double() for k, v in inputs.items() if k.endswith("_mask")}
    x = inputs["x"].double().contiguous(memory_format=torch.channels_last).requires_grad_()
    block(x, **masks)
    monkeypatch.undo()
    return calls


@pytest.mark.long
@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_registered_as_pytorch_wants_it(case: BlockCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are taken by the signs of the outputs' sums: the handle, which has no values, is
    given some."""
    calls = calls_of(case, monkeypatch)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_ones)
    # What was recorded allocates as before.
    replay.forget()
    for name, call in calls.items():
        operator = getattr(torch.ops.coded_resnext, name).default
        leaves = [each.detach().requires_grad_() for each in call.inputs]
        torch.library.opcheck(operator, (leaves, *call[1:]))


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_the_operator_is_the_node(case: BlockCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, also of inputs of which only some are wanted."""
    call = calls_of(case, monkeypatch)["fused_block"]
    for frozen in ([], [0], [1, 4], list(range(1, len(call.inputs)))):
        outcomes = []
        for compiling in (False, True):
            leaves = [
                each.detach().clone().requires_grad_(place not in frozen)
                for place, each in enumerate(call.inputs)
            ]
            with mock.patch.object(torch.compiler, "is_compiling", lambda to=compiling: to):
                outputs = step.fused_block(call._replace(inputs=leaves))
            places = [place for place, each in enumerate(outputs) if each is not None]
            given = [present(outputs[place]) for place in step._DIFFERENTIABLE if place in places]
            grads = [
                torch.linspace(-1, 1, each.numel()).view(each.shape).double() for each in given
            ]
            wanted = [each for each in leaves if each.requires_grad]
            # What the operators' own kernels allocate is compared, the handle has no values.
            made = [present(outputs[place]) for place in places[1:]]
            outcomes.append([*made, *torch.autograd.grad(given, wanted, grads)])
        for one, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_not_written_has_no_memory() -> None:
    block = next(case for case in CASES if case.name == "plain").make()
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    block.backend = "fused"
    y, _ = fused_block.fused_block(block, x, drop_mask=None, keep_mask=None)
    assert isinstance(y, step.Deferred)
    assert y.handle.shape == x.shape
    assert y.handle.untyped_storage().nbytes() == 8
    assert y.sum.main.x.shape == (2, 16, 5, 5)


def test_there_are_no_second_derivatives() -> None:
    """The sentence names the way that has them; a first one with a graph is no reason for it."""
    block = next(case for case in CASES if case.name == "coded").make()
    block.backend = "fused"
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    torch.manual_seed(0)  # The same branches are dropped.
    (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError, match=r'second derivatives use backend="torch"'):
        gradient.sum().backward()
