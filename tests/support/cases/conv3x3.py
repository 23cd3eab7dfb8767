"""Named cases of the grouped 3x3 convolution, and its float64 definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.conv3x3 import library as conv3x3_library
from coded_resnext.kernels.residual import launch as residual_launch


@dataclass(frozen=True)
class GroupedCase:
    """Sizes and options of one call; letters as in docs/math.md."""

    name: str
    N: int = 4
    D: int = 4
    B: int = 2
    H: int = 4
    W: int = 4
    stride: int = 1
    affine: bool = True
    statistics: bool = True

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Channels-last activations, weight, and the affine map in the accumulation dtype."""
        generator = torch.Generator().manual_seed(self.N * self.D + self.H)
        channels = self.N * self.D

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        wide = layout.accumulation_dtype(dtype)
        x = normal(self.B, channels, self.H, self.W).to(dtype)
        tensors = {
            "x": x.contiguous(memory_format=torch.channels_last),
            "weight": (normal(channels, self.D, 3, 3) / math.sqrt(9 * self.D)).to(dtype),
        }
        if self.affine:
            # The bias is large enough for the image of a zero to matter, in the padding above all.
            tensors["scale"] = normal(channels).to(wide)
            tensors["bias"] = normal(channels).to(wide)
        return tensors

    def output_gradients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradients of the output and of its statistics."""
        generator = torch.Generator().manual_seed(1)
        height, width = (-(-size // self.stride) for size in (self.H, self.W))
        shape = (self.B, self.N * self.D, height, width)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        of_statistics = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
        # Those of real statistics are small: a mean of gradients.
        return grad, (0.2 * of_statistics).to(layout.accumulation_dtype(dtype))


def defined(case: GroupedCase, inputs: dict[str, Tensor], *, rounded: bool) -> dict[str, Tensor]:
    """Output, statistics and all gradients by the definition in float64.

    With `rounded` the activations are rounded to the dtype of `x` as the operands of a product
    are; that has no gradient.
    """
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    x = wide["x"]
    if case.affine:
        x = torch.relu(wide["scale"][:, None, None] * x + wide["bias"][:, None, None])
        if rounded:
            x = x + (x.detach().to(inputs["x"].dtype).double() - x.detach())
    y = conv3x3_library.reference(x, wide["weight"], case.N, case.stride)
    grad, grad_statistics = (g.double() for g in case.output_gradients(inputs["x"].dtype))
    results = {"y": y}
    loss = (y * grad).sum()
    if case.statistics:
        results["statistics"] = residual_launch.reference_statistics(y)
        loss = loss + (results["statistics"] * grad_statistics).sum()
    gradients = torch.autograd.grad(loss, list(wide.values()))
    results |= {f"grad_{name}": g for name, g in zip(wide, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}
