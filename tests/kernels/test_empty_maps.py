"""Every operator refuses maps without samples or pixels in the words of the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from coded_resnext import CodedBottleneck
from coded_resnext.kernels import evaluation, layout
from coded_resnext.kernels.coded import operator as coded_operator
from coded_resnext.kernels.conv1x1 import convolution as conv1x1
from coded_resnext.kernels.conv3x3 import convolution as conv3x3
from coded_resnext.kernels.conv3x3 import launch as conv3x3_launch
from coded_resnext.kernels.conv3x3.rows import GroupedSizes
from coded_resnext.kernels.loss import functional as loss_functional
from coded_resnext.kernels.recompute import convolution as recompute
from coded_resnext.kernels.recompute.convolution import Moments
from coded_resnext.kernels.rows import Passes
from coded_resnext.models.fused import block as fused_block
from coded_resnext.models.fused import step
from coded_resnext.models.fused.data_flow import Conv, Convs

N, D, OUT = 4, 3, 8
CHANNELS = N * D
SHAPES = {"no_sample": (0, 3, 2), "no_row": (2, 0, 3), "no_column": (2, 3, 0)}
ALL = Passes(*(True,) * 4).encoded()
Size = tuple[int, int, int]


def maps(size: Size, channels: int = CHANNELS) -> Tensor:
    """A map of ones for a batch, a height and a width."""
    return torch.ones(size[0], channels, *size[1:])


def vector(channels: int = CHANNELS) -> Tensor:
    return torch.ones(channels)


def matrix(outputs: int = OUT, inputs: int = CHANNELS, window: int = 1) -> Tensor:
    return torch.ones(outputs, inputs, window, window)


def of_branches(size: Size) -> tuple[Tensor, ...]:
    """Map, weight of the branches, affine map and the two masks."""
    masks = (torch.ones(size[0], N), torch.ones(size[0], N))
    return maps(size), torch.ones(N, OUT, D), vector(), vector(), *masks


def of_product(size: Size) -> tuple[Any, ...]:
    """What the gradient of a convolution that is not stored takes in front of its flags."""
    moments = Moments(vector(), matrix()[:, :, 0, 0])
    gradients = (maps(size, OUT), *(vector(OUT),) * 3, matrix()[:, :, 0, 0], moments)
    return *gradients, maps(size), matrix(), vector(), vector()


def block_call(size: Size) -> step.Call:
    """Those of a plain block by PyTorch."""
    block = CodedBottleneck(CHANNELS, CHANNELS, D, N, backend="fused")
    x = maps(size)
    plan = fused_block.planned(block, x)
    layers = [
        fused_block._layer(bn, kernels=False)
        for bn in (block.reduce_bn, block.grouped_bn, block.expand_bn)
    ]
    weights = [conv.weight.detach() for conv in (block.reduce, block.grouped, block.expand)]
    convs = [Conv(weight, layer) for weight, layer in zip(weights, layers, strict=True)]
    return step.block_call(plan, x, Convs(*convs, None), (None, None))


def energies(size: Size) -> Tensor:
    """Of two blocks; one without branches where a map has no pixels."""
    return torch.ones(2, size[0], N if size[1] and size[2] else 0)


# An operator's name, the argument that its message names, and its call; kernels are encoded or a
# boolean where they can be chosen.
CALLS: dict[str, tuple[str, Callable[[Size, int], Any]]] = {
    "branch_energy": (
        "z",
        lambda size, _: coded_operator.branch_energy(*of_branches(size)[:4], None),
    ),
    "branch_energy_backward": (
        "z",
        lambda size, _: coded_operator.branch_energy_backward(
            torch.ones(size[0], N), *of_branches(size)[:4], None
        ),
    ),
    "normalize_branches": (
        "z",
        lambda size, _: coded_operator.normalize_branches(*of_branches(size)),
    ),
    "normalize_branches_backward": (
        "z",
        lambda size, _: coded_operator.normalize_branches_backward(
            maps(size),
            torch.ones(size[0], N),
            *of_branches(size),
            torch.ones(size[0], N),
            torch.ones(size[0]),
        ),
    ),
    "coding_loss": (
        "energies",
        lambda size, _: loss_functional.coding_loss_operator(
            energies(size),
            torch.ones(2, 5, energies(size).shape[2], dtype=torch.bool),
            torch.zeros(size[0], dtype=torch.int64),
            torch.ones(size[0]),
            4.0,
            0.0,
            True,
        ),
    ),
    "grouped_conv3x3": (
        "x",
        lambda size, kernels: conv3x3.grouped_conv3x3_operator(
            maps(size), matrix(CHANNELS, D, 3), vector(), vector(), 1, True, kernels
        ),
    ),
    "grouped_conv3x3_backward": (
        "x",
        lambda size, kernels: conv3x3.grouped_conv3x3_backward(
            maps(size),
            maps(size),
            matrix(CHANNELS, D, 3),
            *(None,) * 5,
            *(1, True, True, kernels),
        ),
    ),
    "folded_grouped_conv3x3": (
        "x",
        lambda size, kernels: evaluation.folded_grouped_conv3x3(
            maps(size), matrix(CHANNELS, D, 3), vector(), torch.ones(N, OUT, D), None, 2, kernels
        ),
    ),
    "folded_conv1x1": (
        "x",
        lambda size, kernels: evaluation.folded_conv1x1(
            maps(size), matrix(), vector(OUT), maps(size, OUT), None, kernels
        ),
    ),
    "side_by_side": (
        "h",
        lambda size, _: evaluation.side_by_side(maps(size), torch.ones(size[0]), maps(size)),
    ),
    "fused_block": ("x", lambda size, _: step.fused_block(block_call(size))),
    # What a block is made of.
    "conv1x1.forward": (
        "x",
        lambda size, kernels: conv1x1.forward(
            maps(size), matrix(), vector(), vector(), True, Passes.decoded(kernels)
        ),
    ),
    "conv1x1.backward": (
        "x",
        lambda size, kernels: conv1x1.backward(
            *(maps(size, OUT), *(None,) * 4, maps(size), matrix(), None, None),
            *(True, torch.float32, Passes.decoded(kernels)),
        ),
    ),
    "conv1x1.join": (
        "y",
        lambda size, kernels: conv1x1.join(
            *(maps(size), vector(), vector(), maps(size), None, None, matrix()),
            *(True, False, Passes.decoded(kernels)),
        ),
    ),
    "conv1x1.join_backward": (
        "x",
        lambda size, kernels: conv1x1.join_backward(
            *(maps(size, OUT), *(None,) * 4, maps(size), None, maps(size), None, matrix()),
            *(torch.float32, Passes.decoded(kernels)),
        ),
    ),
    "recompute.statistics": (
        "x",
        lambda size, kernels: recompute.statistics(
            maps(size), vector(), vector(), matrix(), Passes.decoded(kernels)
        )[:1],
    ),
    "recompute.join": (
        "x",
        lambda size, kernels: recompute.join(
            *(maps(size), vector(), vector(), matrix(), vector(OUT), vector(OUT)),
            *(maps(size, OUT), None, None, False, Passes.decoded(kernels)),
        ),
    ),
    "recompute.product_sums": (
        "x",
        lambda size, kernels: recompute.product_sums(
            maps(size, OUT), maps(size), matrix(), vector(), vector(), Passes.decoded(kernels)
        ),
    ),
    "recompute.backward": (
        "x",
        lambda size, kernels: recompute.backward(
            *of_product(size), True, torch.float32, Passes.decoded(kernels)
        ),
    ),
}
# They have what a forward pass has made, which refuses such maps.
BEHIND = {"fused_block_backward", "fused_sum", "fused_sum_backward"}


def test_every_operator_is_among_them() -> None:
    registered = {
        name.partition("::")[2]
        for name in map(str, torch._C._dispatch_get_all_op_names())
        if name.startswith("coded_resnext::")
    }
    registered = {name.partition(".")[0] for name in registered}
    assert {name for name in CALLS if "." not in name} == registered - BEHIND


@pytest.mark.parametrize("kernels", [ALL, 0], ids=["interpreter", "pytorch"])
@pytest.mark.parametrize("operator", CALLS)
def test_calls_are_right_but_for_their_size(
    operator: str, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sample and pixels they give what is finite."""
    _choose(kernels, monkeypatch)
    actual = CALLS[operator][1]((2, 3, 2), kernels)
    values = (actual,) if isinstance(actual, Tensor) else actual
    # The first of a block is a handle without memory.
    for value in values[1:] if operator == "fused_block" else values:
        assert value is None or value.isfinite().all()


@pytest.mark.parametrize("kernels", [ALL, 0], ids=["interpreter", "pytorch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", CALLS)
def test_refused_in_words(
    operator: str, shape: str, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(kernels, monkeypatch)
    name, call = CALLS[operator]
    size = SHAPES[shape]
    given = list(energies(size).shape if name == "energies" else maps(size).shape)
    what = "block, sample and branch" if name == "energies" else "sample, channel and pixel"
    with pytest.raises(ValueError, match=f"^{name}: expected at least one {what}, got ") as error:
        call(size, kernels)
    assert str(error.value).endswith(str(given))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_grouped_launches_refuse_them_too(shape: str) -> None:
    """Their share of the work is a quotient of the sizes."""
    sizes, x = GroupedSizes(N, D), maps(SHAPES[shape])
    weight = matrix(CHANNELS, D, 3)
    size = (x.shape[2], x.shape[3])
    nothing = (None,) * 6
    for name, call in (
        ("x", lambda: conv3x3_launch.forward(x, weight, sizes, None, None, True)),
        ("x", lambda: conv3x3_launch.folded_forward(x, weight, sizes, vector(), None, None)),
        ("grad", lambda: conv3x3_launch.input_gradient(x, weight, sizes, size, *nothing)),
        (
            "grad",
            lambda: conv3x3_launch.weight_gradient(
                x, sizes, *nothing[:3], x, None, None, torch.float32
            ),
        ),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected at least one sample"):
            call()


def _choose(kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The energies and the loss run kernels wherever they can; the others are told."""
    if not kernels:
        for module, name in (
            (layout, "interpreted"),
            (loss_functional, "interpreted"),
        ):
            monkeypatch.setattr(module, name, lambda *_: False)
