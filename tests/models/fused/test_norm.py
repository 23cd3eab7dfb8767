"""BatchNorm as a map of each channel, against PyTorch's own layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from coded_resnext.kernels.affine import statistics_of
from coded_resnext.models.fused.norm import affine_of, uses_batch

SETTINGS = {
    "as it is": {},
    "momentum 0.3": {"momentum": 0.3},
    "cumulative average": {"momentum": None},
    "large epsilon": {"eps": 0.5},
    "no running statistics": {"track_running_stats": False},
    "no weights": {"affine": False},
}


def mapped(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The layer by its map."""
    sums = statistics_of(x, uses_batch(bn))
    scale, bias = affine_of(bn, sums, x.numel() // x.shape[1])
    return x * scale[:, None, None] + bias[:, None, None]


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
    scale, bias = affine_of(bn, statistics_of(x), 32)
    assert scale.dtype == bias.dtype == torch.float32
    assert bn.running_mean.dtype == torch.bfloat16
    expected = nn.BatchNorm2d(3)
    expected(x)
    torch.testing.assert_close(bn.running_var.float(), expected.running_var, rtol=1e-2, atol=1e-2)


def test_a_single_value_cannot_be_normalised() -> None:
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1"):
        affine_of(nn.BatchNorm2d(4), statistics_of(x), 1)


def test_a_deferred_gradient_leaves_its_scale_with_the_statistics() -> None:
    bn = nn.BatchNorm2d(2).double()
    nn.init.normal_(bn.weight)
    sums = statistics_of(torch.randn(3, 2, 2, 2, dtype=torch.float64)).requires_grad_()
    scale, bias = affine_of(bn, sums, 12, deferred=True)
    (grad,) = torch.autograd.grad(scale.sum() + bias.sum(), sums)
    # It is put there, not computed.
    assert torch.equal(grad[0], scale.detach())
    assert grad[1:].abs().min() > 0
