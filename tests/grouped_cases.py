"""Named cases of the grouped 3x3 convolution, its float64 definition, and guarded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from coded_resnext.kernels import reference
from torch import Tensor

GUARD = 64


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

        wide = reference.accumulation_dtype(dtype)
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
        return grad, (0.2 * of_statistics).to(reference.accumulation_dtype(dtype))


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
    y = reference.grouped_conv3x3(x, wide["weight"], case.N, case.stride)
    grad, grad_statistics = (g.double() for g in case.output_gradients(inputs["x"].dtype))
    results = {"y": y}
    loss = (y * grad).sum()
    if case.statistics:
        results["statistics"] = reference.channel_statistics(y)
        loss = loss + (results["statistics"] * grad_statistics).sum()
    gradients = torch.autograd.grad(loss, list(wide.values()))
    results |= {f"grad_{name}": g for name, g in zip(wide, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


class GuardedMemory:
    """Uninitialised memory that is full of NaN, between guards that are, and must stay, NaN."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of NaN between two guards, at an address as good as that of any other."""
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    def guarded(self, tensor: Tensor) -> Tensor:
        """A copy of a channels-last tensor between guards, which a read must not reach."""
        rows = tensor.permute(0, 2, 3, 1)
        copy = self.allocate(tuple(rows.shape), tensor.dtype)
        copy.copy_(rows)
        return copy.permute(0, 3, 1, 2)

    def check(self) -> None:
        """Nothing was written outside the tensors."""
        for buffer, size in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[GUARD + size :].isnan().all()

    def replaces(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`torch.empty` or `Tensor.new_empty` on this memory."""
        is_method = original is not torch.empty

        def empty(*args: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
            if is_method:
                like, *shape = args
                dtype = dtype or like.dtype
            else:
                shape = list(args)
            if len(shape) == 1 and not isinstance(shape[0], int):
                shape = list(shape[0])
            return self.allocate(tuple(shape), dtype or torch.get_default_dtype())

        return empty
