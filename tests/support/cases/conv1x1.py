"""Named cases of the 1x1 convolutions between BatchNorms, and their float64 definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.conv1x1 import join_operator
from coded_resnext.kernels.conv1x1 import operator as conv1x1_operator
from coded_resnext.kernels.conv1x1 import reference as conv1x1_reference
from coded_resnext.kernels.residual import reference as residual_reference
from coded_resnext.kernels.rows import Passes


@dataclass(frozen=True)
class ProductCase:
    """Sizes and options of one call; `I` channels to `O` on `B` maps of `H x W`."""

    name: str
    I: int = 16  # noqa: E741
    O: int = 24  # noqa: E741
    B: int = 2
    H: int = 4
    W: int = 5
    join: bool = False
    """Whether it is `join_conv1x1`."""
    affine: bool = True
    """Whether there are `scale` and `bias`; of a join, a map of the residual."""
    statistics: bool = True
    deferred: bool = False
    signs: bool = True

    @property
    def mapped(self) -> bool:
        return self.join and self.affine

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that have gradients; vectors in the accumulation dtype."""
        generator = torch.Generator().manual_seed(self.I * self.O + self.H)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def image() -> Tensor:
            tensor = normal(self.B, self.I, self.H, self.W).to(dtype)
            return tensor.contiguous(memory_format=torch.channels_last)

        def vector() -> Tensor:
            return normal(self.I).to(layout.accumulation_dtype(dtype))

        weight = (normal(self.O, self.I, 1, 1) / math.sqrt(self.I)).to(dtype)
        if not self.join:
            vectors = {"scale": vector(), "bias": vector()} if self.affine else {}
            return {"x": image(), "weight": weight, **vectors}
        tensors = {"y": image(), "scale": vector(), "bias": vector(), "residual": image()}
        if self.affine:
            tensors |= {"residual_scale": vector(), "residual_bias": vector()}
        return {**tensors, "weight": weight}

    def gradients(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of the outputs: of `y`, of the statistics, and of the block's output `x`."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        # Those of real statistics are small: a mean of gradients. The first row is a factor of the
        # gradient of `y` where that is deferred, and means nothing else.
        of_statistics = normal(3, self.O) * torch.tensor([[1.0], [0.2], [0.2]])
        return {
            "y": normal(self.B, self.O, self.H, self.W).to(dtype),
            "statistics": of_statistics.to(layout.accumulation_dtype(dtype)),
            "x": normal(self.B, self.I, self.H, self.W).to(dtype),
        }


def called(case: ProductCase, inputs: dict[str, Tensor], passes: Passes) -> dict[str, Tensor]:
    """Outputs and all gradients by the operators."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    given = case.gradients(next(iter(inputs.values())).dtype)
    if case.join:
        x, y, statistics, signs = join_operator.join_conv1x1(
            *(leaves.get(name) for name in JOIN_ARGUMENTS),
            case.statistics,
            case.signs,
            case.deferred,
            passes.encoded(),
        )
        outputs = {"x": x, "y": y}
        assert torch.equal(signs, join_operator.pack_signs(x) if case.signs else signs[:0])
    else:
        y, statistics = conv1x1_operator.conv1x1(
            *(leaves.get(name) for name in ARGUMENTS),
            case.statistics,
            case.deferred,
            passes.encoded(),
        )
        outputs = {"y": y}
    if case.statistics:
        outputs["statistics"] = statistics
    else:
        assert statistics.numel() == 0
    actual = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [given[name] for name in outputs]
    )
    results = {name: value.detach() for name, value in outputs.items()}
    return results | {f"grad_{name}": g for name, g in zip(leaves, actual, strict=True)}


ARGUMENTS = ("x", "weight", "scale", "bias")
JOIN_ARGUMENTS = (
    "y",
    "scale",
    "bias",
    "residual",
    "residual_scale",
    "residual_bias",
    "weight",
)


def defined(case: ProductCase, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `called` is to give, in float64.

    Operands of the product are rounded to the dtype of the inputs, which has no gradient.
    """
    dtype = next(iter(inputs.values())).dtype
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    given = {name: value.double() for name, value in case.gradients(dtype).items()}

    def rounded(h: Tensor) -> Tensor:
        return h + (h.detach().to(dtype).double() - h.detach())

    results, loss = {}, torch.zeros((), dtype=torch.float64)
    if case.join:
        x = rounded(residual_reference.join(*(wide[n] for n in JOIN_ARGUMENTS[:-1] if n in wide)))
        results["x"] = x
        loss = loss + (x * given["x"]).sum()
    else:
        x = wide["x"]
        if case.affine:
            x = rounded(torch.relu(_by_channel(wide["scale"]) * x + _by_channel(wide["bias"])))
    results["y"] = y = conv1x1_reference.conv1x1(x, wide["weight"])
    factor = given["statistics"][0] if case.deferred and not case.join else torch.ones(case.O)
    loss = loss + (y * _by_channel(factor) * given["y"]).sum()
    if case.statistics:
        results["statistics"] = residual_reference.channel_statistics(y)
        loss = loss + (results["statistics"][1:] * given["statistics"][1:]).sum()
    actual = torch.autograd.grad(loss, list(wide.values()))
    results |= {f"grad_{name}": g for name, g in zip(wide, actual, strict=True)}
    if case.join and case.deferred:
        results["grad_y"] = results["grad_y"] / _by_channel(wide["scale"])
        if case.mapped:
            factor = _by_channel(wide["residual_scale"])
            results["grad_residual"] = results["grad_residual"] / factor
    return {name: value.detach() for name, value in results.items()}


def _by_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]
