"""Tiles that an architecture has for the sizes of one layer alone, as compiled, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.guarded_memory import guarded_memory
from support.helpers import TOLERANCES, relative_error
from torch import Tensor

from coded_resnext.kernels.conv1x1 import launch as conv1x1_launch
from coded_resnext.kernels.conv1x1.convolution import pack_signs
from coded_resnext.kernels.conv1x1.rows import TILES
from coded_resnext.kernels.recompute import launch as recompute_launch

# Tiles of 32 to 128 rows, the last of them in part, and of each as many for every program: the
# executor has no product of some programs alone.
SHAPE = (2, 9, 10)


def image(channels: int, seed: int) -> Tensor:
    """A map in bfloat16, channels-last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE[0], *SHAPE[1:], channels, generator=generator)
    return x.to(torch.bfloat16).permute(0, 3, 1, 2)


def vector(channels: int, seed: int) -> Tensor:
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed))


def product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", weight.flatten(1).double(), x.double())


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def channels_of(x: Tensor) -> Tensor:
    return x.double()[:, None, None]


def of_forward(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    y, partial = conv1x1_launch.forward(x, weight, None, None, True)
    assert partial is not None
    expected = product(weight, x)
    return [(y, expected), (partial[:, 1].sum(0), expected.sum((0, 2, 3)))]


def of_join(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    inputs, outputs = x.shape[1], len(weight)
    scale, bias = vector(inputs, 2), vector(inputs, 3)
    out_scale, out_bias = vector(outputs, 4), vector(outputs, 5)
    residual, own = image(outputs, 6), (vector(outputs, 7), vector(outputs, 8))
    results = []
    for given in (own, (None, None)):
        ends = (weight, out_scale, out_bias, residual, *given)
        y, signs = recompute_launch.product_join(x, scale, bias, *ends, True)
        h = rounded(torch.relu(channels_of(scale) * x.double() + channels_of(bias)))
        expected = channels_of(out_scale) * product(weight, h) + channels_of(out_bias)
        beside = residual.double()
        if given[0] is not None:
            beside = channels_of(own[0]) * beside + channels_of(own[1])
        results.append((y, torch.relu(expected + beside)))
        assert signs is not None
        assert torch.equal(signs, pack_signs(y))
    return results


def of_join_gradient(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    outputs = len(weight)
    grad, z, grad_x = image(outputs, 2), image(outputs, 3), image(x.shape[1], 4)
    curve, level = vector(outputs, 5), vector(outputs, 6)
    g, partial, moved = conv1x1_launch.join_input_gradient(
        *(grad, grad_x, x, pack_signs(x), None, None, weight, z, None, curve, level, True)
    )
    d = rounded(grad.double() + channels_of(curve) * z.double() + channels_of(level))
    through = product(weight.flatten(1).T, d) + grad_x.double()
    expected = torch.where(x.double() > 0, through, 0.0)
    return [(g, expected), (moved, d), (partial[:, 0].sum(0), expected.sum((0, 2, 3)))]


def of_moments_gradient(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    inputs = x.shape[1]
    scale, bias, shift = vector(inputs, 2), vector(inputs, 3), vector(inputs, 4)
    grad, half = image(len(weight), 5), vector(inputs * inputs, 6).view(inputs, inputs)
    square = (half + half.T).to(torch.bfloat16) / 16
    dx, partial = recompute_launch.moments_gradient(grad, weight, square, shift, x, scale, bias)
    assert partial is not None
    before = channels_of(scale) * x.double() + channels_of(bias)
    dh = product(weight.flatten(1).T, grad) + product(square, rounded(torch.relu(before)))
    dh = torch.where(before > 0, dh + channels_of(shift), 0.0)
    sums = torch.stack([dh.sum((0, 2, 3)), (dh * x.double()).sum((0, 2, 3))])
    return [(dx, channels_of(scale) * dh), (partial.sum(0), sums)]


RESULTS = {
    "product_forward": of_forward,
    "product_join": of_join,
    "join_input_gradient": of_join_gradient,
    "moments_input_gradient": of_moments_gradient,
}


KEYS = [
    *TILES,
    # Not a tile of its own; the sizes at which all is one step, and at which it is not.
    ("sm90", "moments_input_gradient", 128, 256),
    ("sm90", "moments_input_gradient", 256, 512),
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: " ".join(map(str, key)))
def test_tile(key: tuple[str, str, int, int], arch: str) -> None:
    owner, kernel, inputs, outputs = key
    if owner != arch:
        pytest.skip(f"a tile of {owner}")
    x = image(inputs, 0)
    weight = vector(outputs * inputs, 1).view(outputs, inputs, 1, 1) / math.sqrt(inputs)
    with guarded_memory():
        results = RESULTS[kernel](x, weight.to(torch.bfloat16))
    for place, (actual, expected) in enumerate(results):
        error = relative_error(actual.double(), expected)
        assert error < TOLERANCES[torch.bfloat16], place
