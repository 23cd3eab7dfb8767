"""`GroupedConv2d` for `nn.Conv2d`: alone, and inside torchvision's and timm's networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from support.helpers import needs_triton, relative_error
from torch import nn

from coded_resnext import GroupedConv2d, use_grouped_kernels
from coded_resnext.kernels.conv3x3 import launch as conv3x3_launch

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.resnext50_32x4d(weights=None),
    "timm": lambda: timm.create_model("resnext50_32x4d", pretrained=False),
}


def step(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    output = network(x)
    output.square().sum().backward()
    assert x.grad is not None
    named = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **named}


@pytest.mark.parametrize("name", NETWORKS)
def test_swapped_into_a_network_nothing_changes(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    swapped = copy.deepcopy(network)
    # One 3x3 convolution for each of the 3 + 4 + 6 + 3 blocks.
    assert use_grouped_kernels(swapped) == 16
    kinds = [m for m in swapped.modules() if isinstance(m, GroupedConv2d)]
    assert {(m.groups, m.in_channels // m.groups) for m in kinds} == {
        (32, 4),
        (32, 8),
        (32, 16),
        (32, 32),
    }
    assert list(swapped.state_dict()) == list(network.state_dict())
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found, expected = step(swapped, x), step(network, x)
    assert len(found) == len(expected) == 2 + len(list(network.parameters()))
    # Without the kernels PyTorch's convolution runs in both, on the same data.
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("torchvision", "layer1.0.conv2"),
        ("torchvision", "layer2.0.conv2"),
        ("timm", "layer2.1.conv2"),
    ],
)
def test_a_layer_of_a_network_by_the_kernels_agrees_to_rounding(name: str, layer: str) -> None:
    """D = 4, D = 8 with stride 2, and D = 8 without; the interpreter is too slow for all 16."""
    torch.manual_seed(0)
    # Without batch statistics, so that rounding is not blown up where a map has one pixel.
    network = NETWORKS[name]().eval()
    swapped = copy.deepcopy(network)
    use_grouped_kernels(swapped)
    conv = swapped.get_submodule(layer)
    assert isinstance(conv, GroupedConv2d)
    conv.backend = "triton"
    x = torch.randn(1, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    found, expected = step(swapped, x), step(network, x)
    errors = {key: relative_error(found[key], value) for key, value in expected.items()}
    assert 0 < max(errors.values()) < 1e-5, errors


@needs_triton
@pytest.mark.parametrize("stride", [1, 2])
def test_with_the_kernels_results_agree_to_rounding(stride: int) -> None:
    """Forward and backward through the kernels, in the interpreter, inside a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(16, 16, 3, stride, 1, groups=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, "same", groups=2, bias=False),
    )
    swapped = copy.deepcopy(network)
    assert use_grouped_kernels(swapped, backend="triton") == 2
    x = torch.randn(2, 3, 4, 5)
    found, expected = step(swapped, x), step(network, x)
    for key, value in expected.items():
        # The first BatchNorm takes away what the bias before it adds; its gradient is rounding.
        if key != "1.bias":
            assert relative_error(found[key], value) < 1e-5, key
    assert found["1.bias"].abs().max() < 1e-3


def test_a_regnet_has_them_too() -> None:
    network = timm.create_model("regnetx_002", pretrained=False)
    grouped = sum(type(m) is nn.Conv2d and m.groups > 1 for m in network.modules())
    assert use_grouped_kernels(network) == grouped > 0


@needs_triton
def test_the_kernels_run_only_when_they_are_to(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    forward = conv3x3_launch.forward
    monkeypatch.setattr(
        conv3x3_launch, "forward", lambda *args: calls.append("forward") or forward(*args)
    )
    conv = GroupedConv2d(8, 8, groups=2, bias=False)
    x = torch.randn(1, 8, 3, 3)
    conv(x)
    conv.backend = "torch"
    conv(x)
    assert calls == []
    conv.backend = "triton"
    conv(x)
    assert calls == ["forward"]


def test_what_is_no_grouped_3x3_convolution_is_left_alone() -> None:
    class Special(nn.Conv2d):
        """Somebody's own convolution."""

    others = [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 5, padding=2, groups=2),
        nn.Conv2d(8, 8, 3, padding=0, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(8, 8, 3, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, (1, 2), padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect"),
        Special(8, 8, 3, padding=1, groups=2),
    ]
    network = nn.ModuleList([*others, nn.Conv2d(8, 8, 3, padding=1, groups=2)])
    assert use_grouped_kernels(network, backend="torch") == 1
    assert [type(m) for m in network][:-1] == [type(m) for m in others]
    # Again, with another backend: what it has made follows.
    assert use_grouped_kernels(network, backend="triton") == 1
    assert network[-1].backend == "triton"


def test_hooks_and_references_survive() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    seen: list[torch.Size] = []
    conv.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    weight = conv.weight
    use_grouped_kernels(nn.Sequential(conv))
    assert isinstance(conv, GroupedConv2d)
    assert conv.weight is weight
    conv(torch.randn(1, 8, 2, 2))
    assert seen == [(1, 8, 2, 2)]


def test_state_goes_both_ways_and_no_batch_is_no_problem() -> None:
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    grouped = GroupedConv2d(8, 8, groups=2, backend="triton")
    grouped.load_state_dict(plain.state_dict())
    plain.load_state_dict(grouped.state_dict())
    x = torch.randn(8, 3, 4)
    # An image without a batch is PyTorch's to compute, in both.
    assert torch.equal(grouped(x), plain(x))
    assert grouped(torch.randn(0, 8, 3, 3)).shape == (0, 8, 3, 3)
    assert "groups=2" in repr(grouped)
    assert "backend=triton" in repr(grouped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 5}, r"kernel_size: expected \(3, 3\), got \(5, 5\)"),
        ({"padding": 0}, r"padding: expected 1, got \(0, 0\)"),
        ({"dilation": 2}, r"dilation: expected \(1, 1\), got \(2, 2\)"),
        ({"stride": 3}, r"stride: expected 1 or 2, got \(3, 3\)"),
        ({"out_channels": 16}, "out_channels: expected 8, got 16"),
        ({"padding_mode": "reflect"}, "padding_mode: expected zeros, got reflect"),
        ({"backend": "cudnn"}, "backend: expected one of auto, torch, merged, triton; got 'cudnn'"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "groups": 2}
    GroupedConv2d(**arguments)
    with pytest.raises(ValueError, match=message):
        GroupedConv2d(**{**arguments, **change})


def test_unknown_backend_of_the_patch_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend: expected one of auto, torch, merged, triton; got 'x'"
    ):
        use_grouped_kernels(nn.Sequential(), backend="x")  # type: ignore[arg-type]
