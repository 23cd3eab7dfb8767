"""Named cases of the kernels for a 1x1 convolution that is not stored, and a check of moments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from support.guarded_memory import guarded_memory
from support.helpers import relative_error
from torch import Tensor

from coded_resnext.kernels.recompute.launch import moments

# The mean is that of what is multiplied, of which some lie so near the middle of two numbers that
# float64 rounds them the other way. Deviations are rounded before they are multiplied.
MEAN_TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-5}
SCATTER_TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4}


@dataclass(frozen=True)
class Case:
    """`I` channels to `O` on `B` maps of `H x W`. Tiles of float32 have 32 pixels and 64 channels,
    those of float16 64 and 128."""

    name: str
    I: int = 16  # noqa: E741
    O: int = 24  # noqa: E741
    B: int = 2
    H: int = 4
    W: int = 5

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All arguments of the three functions; vectors, and what a gradient multiplies by, in
        float32."""
        generator = torch.Generator().manual_seed(self.I * self.O + self.H)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(channels: int) -> Tensor:
            maps = normal(self.B, channels, self.H, self.W).to(dtype)
            return maps.contiguous(memory_format=torch.channels_last)

        square = normal(self.I, self.I) / math.sqrt(self.I)
        return {
            "x": image(self.I),
            "scale": normal(self.I),
            "bias": normal(self.I),
            "weight": (normal(self.O, self.I, 1, 1) / math.sqrt(self.I)).to(dtype),
            "out_scale": normal(self.O),
            "out_bias": normal(self.O),
            "residual": image(self.O),
            "residual_scale": normal(self.O),
            "residual_bias": normal(self.O),
            "factor": normal(self.B).abs() + 0.5,
            "grad": image(self.O),
            "square": square + square.T,
            "shift": normal(self.I),
        }


CASES = [
    Case("one_block"),
    Case("one_pixel", B=1, H=1, W=1),
    Case("one_channel", I=1, O=1, H=2, W=3),
    Case("exact_tiles", I=64, O=64, B=1, H=8, W=8),
    Case("pixels_end_inside_a_tile", I=24, B=3, H=5, W=7),
    Case("odd_channels", I=7, O=5, B=3, H=3, W=3),
    Case("steps_and_columns", I=40, O=136, B=1, H=7, W=9),
    Case("resident", I=128, O=256, B=1, H=5, W=7),
    Case("three_columns", I=200, O=40, B=1, H=9, W=8),
    Case("wide", I=256, O=24, B=1, H=3, W=7),
]
BOTH = [torch.float32, torch.float16]


def by_channel(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def activated(given: dict[str, Tensor]) -> Tensor:
    """What the kernels multiply, in float64."""
    x = given["x"]
    if "scale" not in given:
        return x.double()
    h = torch.relu(by_channel(given["scale"]) * x.double() + by_channel(given["bias"]))
    return h.to(x.dtype).double()


def moments_of(a: Tensor) -> tuple[Tensor, Tensor]:
    pixels = a.transpose(0, 1).flatten(1)
    mean = pixels.mean(1)
    apart = pixels - mean[:, None]
    return mean, apart @ apart.T


def check_moments(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    dtype = given["x"].dtype
    with guarded_memory():
        mean, scatter = moments(given["x"], given.get("scale"), given.get("bias"))
    expected_mean, expected = moments_of(activated(given))
    assert mean.dtype == scatter.dtype == torch.float32
    assert relative_error(mean.double(), expected_mean) < MEAN_TOLERANCES[dtype]
    # Of one pixel it is 0, exactly.
    assert (scatter.double() - expected).norm() <= SCATTER_TOLERANCES[dtype] * expected.norm()
    assert torch.equal(scatter, scatter.T)
    return mean, scatter
