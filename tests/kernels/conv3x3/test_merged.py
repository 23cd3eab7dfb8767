"""Grouped convolutions by wider groups against themselves."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from bench_host import Counting
from support.helpers import relative_error
from torch import Tensor
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode

from coded_resnext import GroupedConv2d
from coded_resnext.kernels import backend, grouped_conv3x3, layout
from coded_resnext.kernels.conv3x3.library import merged_conv3x3
from coded_resnext.kernels.conv3x3.rows import GroupedSizes, merged_width

MERGED = [(8, 4, 1, 32), (8, 4, 1, 16), (4, 8, 2, 16), (6, 3, 1, 9), (2, 5, 2, 10), (4, 16, 1, 32)]


def tensors(groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(groups * width)
    x = torch.randn(3, groups * width, 7, 6, generator=generator).to(dtype)
    weight = torch.randn(groups * width, width, 3, 3, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), weight


_CONV2D = F.conv2d


@pytest.mark.parametrize(("groups", "width", "stride", "merged"), MERGED)
def test_values_and_gradients_are_those_of_the_groups(
    groups: int, width: int, stride: int, merged: int
) -> None:
    x, weight = tensors(groups, width, torch.float64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaves = [x.clone(), weight.double().contiguous(memory_format=memory_format)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = merged_conv3x3(*leaves, stride, merged)
        expected = F.conv2d(*leaves, None, stride, 1, 1, groups)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        own = torch.autograd.grad(y, leaves, grad)
        for one, other in zip(own, torch.autograd.grad(expected, leaves, grad), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert own[1].stride() == leaves[1].stride()


def test_a_weight_of_which_groups_share_the_memory() -> None:
    x, weight = tensors(4, 4, torch.float64)
    of_group = weight[:4].double().requires_grad_()

    def gradient(width: int) -> Tensor:
        shared = of_group[None].expand(4, 4, 4, 3, 3).reshape(16, 4, 3, 3)
        one_group = of_group[:1].expand(16, 4, 3, 3)
        y = merged_conv3x3(x, shared, 1, width) + merged_conv3x3(x, one_group, 1, width)
        return torch.autograd.grad(y.sin().sum(), of_group)[0]

    torch.testing.assert_close(gradient(16), gradient(4), rtol=1e-12, atol=1e-12)


def test_gradients_have_gradients() -> None:
    x, weight = tensors(4, 2, torch.float64)
    leaves = (x[:1, :, :3, :2].clone().requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *each: merged_conv3x3(*each, 1, 4), leaves)


def test_autocast_rounds_the_weight_once() -> None:
    x, weight = tensors(8, 4, torch.float32)
    layers = [GroupedConv2d(32, 32, groups=8, bias=False, backend=b) for b in ("torch", "merged")]  # type: ignore[arg-type]
    outcomes = []
    for layer in layers:
        layer.weight.data.copy_(weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().sin().sum().backward()
        assert layer.weight.grad is not None
        outcomes.append((y, layer.weight.grad))
    for one, other in zip(*outcomes, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one.double(), other.double()) < 1e-2


@pytest.mark.parametrize(
    ("arch", "sizes", "by_default", "by_name"),
    [
        ("sm90", GroupedSizes(32, 4), 32, 32),
        ("sm90", GroupedSizes(32, 8), 16, 16),
        ("sm90", GroupedSizes(32, 8, 2), 8, 16),
        ("sm90", GroupedSizes(3, 4), 4, 12),
        ("sm80", GroupedSizes(32, 4), 4, 16),
        ("cpu", GroupedSizes(10, 11), 11, 22),
        ("cpu", GroupedSizes(32, 32), 32, 32),
    ],
    ids=str,
)
def test_groups_are_merged_where_it_was_measured_to_win_or_by_name(
    arch: str, sizes: GroupedSizes, by_default: int, by_name: int
) -> None:
    assert merged_width(sizes, arch, forced=False) == by_default
    assert merged_width(sizes, arch, forced=True) == by_name


@pytest.mark.parametrize(
    ("arch", "dtype", "memory_format", "groups"),
    [
        ("sm90", torch.bfloat16, torch.channels_last, 4),
        ("sm90", torch.bfloat16, torch.contiguous_format, 32),
        ("sm90", torch.float32, torch.channels_last, 32),
        ("sm80", torch.bfloat16, torch.channels_last, 32),
    ],
)
def test_the_layer_on_a_gpu(
    arch: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    groups: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On fake CUDA tensors, which need no GPU."""
    monkeypatch.setattr(layout, "architecture", lambda _index: arch)
    monkeypatch.setattr(layout, "without_kernels", lambda _index: "not here")
    given = []
    monkeypatch.setattr(F, "conv2d", lambda *args: given.append(args[-1]) or _CONV2D(*args))
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger=backend.LOGGER.name):
        layer = GroupedConv2d(128, 128, groups=32, bias=False, device="cuda", dtype=dtype)
        x = torch.empty(2, 128, 8, 8, device="cuda", dtype=dtype)
        layer(x.contiguous(memory_format=memory_format))
    assert set(given) <= {groups}
    assert ("by groups of 32" in caplog.text) == (groups == 4)


def test_one_launch_merges_and_one_gathers() -> None:
    """Both round, and leave the layout that cuDNN and the optimizer read."""
    x, weight = tensors(8, 4, torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    merged_conv3x3(x, weight, 1, 16)  # what is set up once
    with Counting() as counting:
        merged_conv3x3(x, weight, 1, 16).sum().backward()
    launched = Counter(name for _, name in counting.launches.elements())
    assert launched["mul"] == launched["copy_"] == 1
    assert set(launched) <= {
        *("mul", "copy_", "convolution", "convolution_backward"),
        *("sum", "ones_like"),
    }
    assert weight.grad is not None
    assert (weight.grad.dtype, weight.grad.stride()) == (weight.dtype, weight.stride())


def test_compiled_it_takes_a_kernel_more_forward_and_one_backward() -> None:
    x, weight = tensors(8, 4, torch.float32)
    generated, outcomes = [], []
    for by in ("torch", "merged"):
        torch._dynamo.reset()
        metrics.reset()
        layer = GroupedConv2d(32, 32, groups=8, bias=False, backend=by)  # type: ignore[arg-type]
        layer.weight.data.copy_(weight)

        def loss(x: Tensor, layer: GroupedConv2d = layer) -> Tensor:
            return layer(x.sin()).cos().sum()

        leaf = x.clone().requires_grad_()
        torch.compile(loss, fullgraph=True)(leaf).backward()
        generated.append(metrics.generated_kernel_count)
        outcomes.append((leaf.grad, layer.weight.grad))
    assert generated[1] == generated[0] + 2
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_only_the_kernels_take() -> None:
    x, weight = tensors(4, 4, torch.float32)
    with pytest.raises(ValueError, match="backend: 'merged' takes no scale, bias or statistics"):
        grouped_conv3x3(x, weight, 4, statistics=True, backend="merged")
    # A transform of torch.func sees the convolution itself.
    layer = GroupedConv2d(16, 16, groups=4, bias=False, backend="merged")
    per_sample = torch.func.vmap(torch.func.grad(lambda each: layer(each[None]).square().sum()))
    assert per_sample(x).shape == x.shape
