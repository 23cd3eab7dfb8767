"""BatchNorm as a map of each channel, against PyTorch's own layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.helpers import needs_triton, relative_error
from torch import Tensor, nn

from coded_resnext import CodedBottleneck
from coded_resnext.kernels.affine import add_statistics_gradient, statistics_of
from coded_resnext.kernels.batch_norm import launch as batch_norm
from coded_resnext.models.fused.block import _layer
from coded_resnext.models.fused.norm import tracked, update_running, uses_batch

SETTINGS = {
    "as it is": {},
    "momentum 0.3": {"momentum": 0.3},
    "cumulative average": {"momentum": None},
    "large epsilon": {"eps": 0.5},
    "no running statistics": {"track_running_stats": False},
    "no weights": {"affine": False},
}


class Mapped(torch.autograd.Function):
    """A layer by its map, and its gradients by the sums that convolutions take."""

    @staticmethod
    def forward(ctx: Any, bn: nn.BatchNorm2d, x: Tensor, *_parameters: Tensor) -> Tensor:
        ctx.layer = _layer(bn, kernels=False)
        partial = statistics_of(x) if uses_batch(bn) else None
        ctx.normalization = ctx.layer.normalization(partial, x.dtype)
        update_running([bn], [ctx.normalization.moments])
        ctx.save_for_backward(x)
        bias, scale = ctx.normalization.map
        return x * scale[:, None, None] + bias[:, None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * x).sum((0, 2, 3))])[None]
        own, curve, level = ctx.layer.backward(sums, ctx.normalization)
        dx = add_statistics_gradient(
            grad, None if curve is None else x, ctx.normalization.map[1], curve, level
        )
        layer = ctx.layer
        return None, dx, *((own.weight, own.bias) if layer.weight is not None else ())


def mapped(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    y: Tensor = Mapped.apply(bn, x, *bn.parameters())
    return y


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_pytorchs_layer(settings: dict[str, object]) -> None:
    """Three training steps, frozen and in evaluation: results, gradients, buffers."""
    torch.manual_seed(0)
    expected = nn.BatchNorm2d(5, **settings).double()
    for parameter in expected.parameters():
        nn.init.normal_(parameter, 1, 0.5)
    actual = copy.deepcopy(expected)
    for train in (True, True, True, False):
        x = (2 + 3 * torch.randn(4, 5, 3, 3, dtype=torch.float64)).requires_grad_()
        weights = torch.randn(4, 5, 3, 3, dtype=torch.float64)
        outcomes = []
        for bn, call in (
            (actual.train(train), mapped),
            (expected.train(train), nn.Module.__call__),
        ):
            y = call(bn, x)
            inputs = [x, *bn.parameters()]
            outcomes.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
        for one, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(
                dict(actual.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12
            )


def test_half_precision_layers_keep_their_dtype() -> None:
    bn = nn.BatchNorm2d(3).bfloat16()
    x = torch.randn(2, 3, 4, 4)
    normalization = _layer(bn, kernels=False).normalization(statistics_of(x), torch.float32)
    assert normalization.map.dtype == torch.float32
    update_running([bn], [normalization.moments])
    assert bn.running_mean.dtype == torch.bfloat16
    expected = nn.BatchNorm2d(3)
    expected(x)
    torch.testing.assert_close(bn.running_var.float(), expected.running_var, rtol=1e-2, atol=1e-2)


def test_layers_of_several_momenta() -> None:
    """Those of a block are brought up to date together, each by its own."""
    layers = [nn.BatchNorm2d(3, momentum=momentum).double() for momentum in (0.1, 0.4, None)]
    expected = copy.deepcopy(layers)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        moments = [
            _layer(bn, kernels=False).normalization(statistics_of(x), x.dtype).moments
            for bn in layers
        ]
        update_running(layers, moments)
        for bn in expected:
            bn(x)
    for one, other in zip(layers, expected, strict=True):
        for a, b in zip(one.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_a_kernel_brings_running_statistics_up_to_date(momentum: float) -> None:
    """In the launch that normalises, and batches are counted by one of its programs."""
    expected = nn.BatchNorm2d(19, momentum=momentum)
    actual = copy.deepcopy(expected)
    assert tracked([actual.eval()]) == [None]
    (running,) = tracked([actual.train()]) or []
    layer = _layer(actual, kernels=True)._replace(tracked=running)
    for _ in range(3):
        x = 2 + 3 * torch.randn(2, 19, 4, 4)
        layer.normalization(statistics_of(x), x.dtype)
        expected(x)
    for one, other in zip(actual.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"momentum": None}, {"dtype": torch.float64}], ids=str)
def test_what_no_kernel_brings_up_to_date(settings: dict[str, Any]) -> None:
    """One such layer, and PyTorch does so for all of a block."""
    assert tracked([nn.BatchNorm2d(3), nn.BatchNorm2d(3, **settings)]) is None


def test_a_single_value_cannot_be_normalised() -> None:
    block = CodedBottleneck(4, 4, 1, 4, backend="fused")
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1"):
        block(torch.randn(1, 4, 1, 1))


@needs_triton
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("parts", [1, 5, 300])
def test_kernels_are_the_algebra(parts: int, weight: bool) -> None:
    """Of parts of any number, among them one without values."""
    generator = torch.Generator().manual_seed(parts)
    partial = torch.rand(parts, 3, 27, generator=generator)
    partial[:, 0] = 7
    if parts > 1:
        partial[2] = 0
    own = [torch.rand(27, generator=generator) if weight else None for _ in range(2)]
    sums = torch.randn(parts, 3, 27, generator=generator)
    wide = [None if each is None else each.double() for each in own]
    expected = batch_norm.forward(partial.double(), batch_norm.Norm(*wide, 1e-5), False)
    actual = batch_norm.forward(partial, batch_norm.Norm(*own, 1e-5), True)
    gradients = batch_norm.backward(sums, actual, True, scale=2)
    of_expected = batch_norm.backward(sums.double(), expected, False, scale=2)
    for a, b in zip([*actual, *gradients], [*expected, *of_expected], strict=True):
        assert relative_error(a.double(), b) < 2e-6
