"""Named cases of the 1x1 convolutions between BatchNorms, and their float64 definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext.kernels import layout
from coded_resnext.kernels.affine import statistics_gradient
from coded_resnext.kernels.batch_norm import launch as batch_norm_launch
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.residual import launch as residual_launch
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
    """Whether the sum that ends a block is before it."""
    affine: bool = True
    """Whether there are `scale` and `bias`; of a join, a map of the residual."""
    statistics: bool = True
    gain: bool = False
    """Whether the gradient of the output comes without a factor for each channel."""
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

        # Those of real statistics are small: a mean of gradients. The first row is the factor of
        # the gradient of `y`, where there is one, and means nothing else.
        of_statistics = normal(3, self.O) * torch.tensor([[1.0], [0.2], [0.2]])
        return {
            "y": normal(self.B, self.O, self.H, self.W).to(dtype),
            "statistics": of_statistics.to(layout.accumulation_dtype(dtype)),
            "x": normal(self.B, self.I, self.H, self.W).to(dtype),
        }


def called(case: ProductCase, inputs: dict[str, Tensor], passes: Passes) -> dict[str, Tensor]:
    """Outputs and all gradients; of a sum before it `grad_y` is that behind its ReLU."""
    given = case.gradients(next(iter(inputs.values())).dtype)
    weight = inputs["weight"]
    if case.join:
        x, y, partial, signs = convolution.join(
            *(inputs.get(name) for name in JOIN_ARGUMENTS), case.statistics, case.signs, passes
        )
        outputs = {"x": x, "y": y}
        assert (signs is None) != case.signs
        assert signs is None or torch.equal(signs, convolution.pack_signs(x))
    else:
        arguments = (inputs.get(name) for name in ARGUMENTS)
        y, partial = convolution.forward(*arguments, case.statistics, passes)
        outputs = {"y": y}
    curve = level = None
    assert (partial is None) != case.statistics
    if partial is not None:
        by_kernels = passes.forward or passes.pointwise
        outputs["statistics"] = statistics = batch_norm_launch.merged(partial, by_kernels)
        curve, level = statistics_gradient(given["statistics"], statistics)
    kept = y if case.statistics else None
    if case.join:
        gradients = convolution.join_backward(
            *(given["y"], kept, curve, level, given["x"], x, signs, inputs["y"]),
            *(inputs["residual"] if case.affine else None, weight, weight.dtype, passes),
        )
    else:
        gain = given["statistics"][0] if case.gain else None
        gradients = convolution.backward(
            *(given["y"], kept, gain, curve, level),
            *(inputs.get(name) for name in ARGUMENTS),
            *(True, weight.dtype, passes),
        )
    assert gradients.input is not None
    assert gradients.weight is not None
    results = {"grad_weight": gradients.weight}
    if case.join:
        results |= {"grad_y": gradients.input, "grad_residual": gradients.input}
        rows = ("grad_bias", "grad_scale", "grad_residual_scale")
    else:
        results |= {"grad_x": gradients.input}
        rows = ("grad_bias", "grad_scale")
    if gradients.sums is not None:
        results |= dict(zip(rows, gradients.sums.sum(0), strict=False))
    if case.mapped:
        results["grad_residual_bias"] = results["grad_bias"]
    return {name: value.detach() for name, value in outputs.items()} | results


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
        x = rounded(residual_launch.reference(*(wide[n] for n in JOIN_ARGUMENTS[:-1] if n in wide)))
        results["x"] = x
        loss = loss + (x * given["x"]).sum()
    else:
        x = wide["x"]
        if case.affine:
            x = rounded(torch.relu(_by_channel(wide["scale"]) * x + _by_channel(wide["bias"])))
    results["y"] = y = conv1x1_library.reference(x, wide["weight"])
    factor = given["statistics"][0] if case.gain else torch.ones(case.O)
    loss = loss + (y * _by_channel(factor) * given["y"]).sum()
    if case.statistics:
        results["statistics"] = residual_launch.reference_statistics(y)
        loss = loss + (results["statistics"][1:] * given["statistics"][1:]).sum()
    actual = torch.autograd.grad(loss, list(wide.values()))
    results |= {f"grad_{name}": g for name, g in zip(wide, actual, strict=True)}
    if case.join:
        results["grad_y"] = results["grad_y"] / _by_channel(wide["scale"])
        if case.mapped:
            factor = _by_channel(wide["residual_scale"])
            results["grad_residual"] = results["grad_residual"] / factor
    return {name: value.detach() for name, value in results.items()}


def _by_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]
