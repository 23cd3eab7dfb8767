"""Calls of the coded operators against their definitions in float64: results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.cases.differentiable import Conv1x1, Join, ProductJoin
from support.helpers import TOLERANCES, map_and_energies
from support.strategies import Call
from torch import Tensor

from coded_resnext import Codebook, CodedBottleneck
from coded_resnext.kernels import (
    branch_energy,
    coded_aggregate,
    coding_losses,
    grouped_conv3x3,
    layout,
)
from coded_resnext.kernels.coded import reference as coded_reference
from coded_resnext.kernels.conv1x1 import library as conv1x1_library
from coded_resnext.kernels.conv3x3 import library as conv3x3_library
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import NO_PASSES, Passes

# Sums of up to 70,000 terms, where the table is for some hundred.
LONGER_SUMS = 4.0
Results = dict[str, Tensor]


def check(operator: str, call: Call, backend: str, device: str = "cpu") -> None:
    """Refused with a sentence for no samples; otherwise the numbers of the definition."""
    run = RUNS[operator]
    inputs = {k: v.to(device) for k, v in INPUTS[operator](call).items()}
    if call.B == 0:
        with pytest.raises(ValueError, match=r"expected (at least one sample|\[B, \d+, H, W\])"):
            run(call, backend, inputs)
        return
    kept = {name: value.clone() for name, value in inputs.items()}
    results = gradients(call, inputs, lambda leaves: run(call, backend, leaves))
    for name, value in kept.items():
        assert torch.equal(inputs[name], value), f"{name} was written to"
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = gradients(call, exact, lambda leaves: run(call, "reference", leaves))
    with patch.object(coded_reference, "coded_aggregate", held):
        scales = gradients(call, exact, lambda leaves: run(call, "reference", leaves))
    limit = LONGER_SUMS * TOLERANCES[call.dtype]
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        actual = results[name].double()
        assert actual.shape == value.shape, name
        if value.abs().max() > torch.finfo(results[name].dtype).max:
            # What half precision cannot hold is infinite, and so is found by whoever looks.
            assert not actual.isfinite().all(), name
            continue
        assert actual.isfinite().all(), name
        scale = max(float(value.abs().max()), float(scales[name].abs().max()), 1e-300)
        error = float((actual - value).abs().max()) / scale
        assert error <= limit, f"{name}: error {error:.2g} in {call}"


def gradients(call: Call, inputs: Results, run: Callable[[Results], Results]) -> Results:
    """Outputs, and the gradients of their sums weighted by positive numbers."""
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point() and name not in NO_GRADIENT)
        for name, value in inputs.items()
    }
    outputs = run(leaves)
    chosen = [v for v in outputs.values() if v.requires_grad]
    weights = [
        call.positive(*value.shape, place=index).to(value) for index, value in enumerate(chosen)
    ]
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    of_leaves = torch.autograd.grad(chosen, list(wanted.values()), weights)
    results = {k: v.detach() for k, v in outputs.items()}
    return results | {f"gradient of {k}": g for k, g in zip(wanted, of_leaves, strict=True)}


def held(
    h: Tensor,
    branch_weight: Tensor,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    *,
    concatenate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition with `M` held: gradients of the size of those that are subtracted in (14)."""
    outputs = coded_reference.branch_outputs(h, branch_weight)
    if keep_mask is not None:
        outputs = outputs * keep_mask.to(outputs)[:, :, None, None, None]
    energy = outputs.square().mean((2, 3, 4))
    mean = energy.mean(1, keepdim=True).detach()
    normalized = outputs / mean.sqrt()[:, :, None, None, None]
    if drop_mask is not None:
        normalized = normalized * drop_mask.to(outputs)[:, :, None, None, None]
    y = normalized.flatten(1, 2) if concatenate else normalized.sum(1)
    return y, energy / mean


NO_GRADIENT = ("drop_mask", "keep_mask", "codewords", "targets")


def _weighted(call: Call) -> Results:
    columns = call.D if call.concat else call.N * call.D
    weight = call.positive(call.C, columns, 1, 1, place=1).to(call.dtype)
    return {"h": call.activations(), "weight": weight}


def _affine(call: Call) -> Results:
    if not call.affine:
        return {}
    wide = layout.accumulation_dtype(call.dtype)
    return {
        name: call.positive(call.N * call.D, place=place).to(wide)
        for name, place in (("scale", 2), ("bias", 3))
    }


def _energy_inputs(call: Call) -> Results:
    masks = {k: v for k, v in call.masks().items() if k == "keep_mask"}
    return _weighted(call) | _affine(call) | masks


def _aggregate_inputs(call: Call) -> Results:
    return _weighted(call) | call.masks()


def _loss_inputs(call: Call) -> Results:
    generator = torch.Generator().manual_seed(call.seed)
    codewords = torch.rand(call.K, call.N, generator=generator).argsort(1) < max(1, call.N // 2)
    targets: Tensor = torch.randint(call.K, (call.B,), generator=generator)
    if call.affine:
        targets = call.positive(call.B, call.K, place=4)
        targets = (targets / targets.sum(1, keepdim=True)).float()
    energies = call.positive(call.B, call.N, low=0.0).to(call.dtype) * 2
    return {"energies": energies, "codewords": codewords, "targets": targets}


def _conv_inputs(call: Call) -> Results:
    channels = call.N * call.D
    weight = call.positive(channels, call.D, 3, 3, place=1).to(call.dtype)
    return {"x": call.activations(), "weight": weight} | _affine(call)


def _conv1x1_inputs(call: Call) -> Results:
    weight = call.positive(call.C, call.N * call.D, 1, 1, place=1).to(call.dtype)
    return {"x": call.activations(), "weight": weight} | _affine(call)


def _join_inputs(call: Call) -> Results:
    """With a map of the residual where there would be one of the operand."""
    wide = layout.accumulation_dtype(call.dtype)
    vectors = {
        name: call.positive(call.N * call.D, place=place).to(wide)
        for name, place in (("scale", 4), ("bias", 5))
    }
    residual = call.positive(call.B, call.N * call.D, call.H, call.W, place=6).to(call.dtype)
    mapped = {f"residual_{name}": value for name, value in _affine(call).items()}
    operands = _conv1x1_inputs(call)
    joined = {"y": operands["x"], **vectors, "residual": residual, **mapped}
    return joined | {"weight": operands["weight"]}


def _product_join_inputs(call: Call) -> Results:
    """The last convolution of a block, with a map of the residual where others have one of `x`."""
    wide = layout.accumulation_dtype(call.dtype)
    weight = call.positive(call.C, call.N * call.D, 1, 1, place=1).to(call.dtype)
    vectors = {"scale": call.N * call.D, "bias": call.N * call.D}
    vectors |= {"out_scale": call.C, "out_bias": call.C}
    if call.affine:
        vectors |= {"residual_scale": call.C, "residual_bias": call.C}
    tensors = {"x": call.activations(), "weight": weight}
    for place, (name, channels) in enumerate(vectors.items()):
        tensors[name] = call.positive(channels, place=2 + place).to(wide)
    residual = call.positive(call.B, call.C, call.H, call.W, place=8)
    next_weight = call.positive(call.K, call.C, 1, 1, place=9)
    return tensors | {
        name: value.to(call.dtype)
        for name, value in (("residual", residual), ("next_weight", next_weight))
    }


def _block_inputs(call: Call) -> Results:
    return {"x": call.activations()} | call.masks()


def _energy(call: Call, backend: str, x: Results) -> Results:
    return {"energies": branch_energy(branches=call.N, backend=backend, **x)}


def _aggregate(call: Call, backend: str, x: Results) -> Results:
    aggregation = "concat" if call.concat else "sum"
    y, energies = coded_aggregate(branches=call.N, aggregation=aggregation, backend=backend, **x)
    return {"y": y, "energies": energies}


def _loss(call: Call, backend: str, x: Results) -> Results:
    energies, codewords, targets = x["energies"], x["codewords"], x["targets"]
    losses = coding_losses([energies], [codewords], targets, decode=True, backend=backend)
    return {"loss": losses.losses[0]}


def _conv(call: Call, backend: str, x: Results) -> Results:
    if backend == "reference":
        affine = (x.get("scale"), x.get("bias"))
        y = conv3x3_library.reference(x["x"], x["weight"], call.N, call.stride, *affine)
        return {"y": y, "sum": y.sum((0, 2, 3))}
    y, statistics = grouped_conv3x3(
        groups=call.N, stride=call.stride, statistics=True, backend=backend, **x
    )
    return {"y": y, "sum": _checked_sum(call, y, statistics)}


def _checked_sum(call: Call, y: Tensor, statistics: Tensor | None) -> Tensor:
    """The sum among the statistics of `y`; the others are compared with `y` itself."""
    assert statistics is not None
    count, total, squares = statistics
    assert (count == y.numel() // y.shape[1]).all()
    exact = y.detach().double()
    largest = float(exact.square().sum((0, 2, 3)).max())
    m2 = (exact - exact.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    # The statistics are those of the sums before they are rounded to the dtype of y; squares of
    # the smallest numbers are zero in float32.
    limit = TOLERANCES[call.dtype] * largest + torch.finfo(torch.float32).tiny
    assert not exact.isfinite().all() or float((squares.detach() - m2).abs().max()) <= limit
    return total


def _conv1x1(call: Call, backend: str, x: Results) -> Results:
    if backend == "reference":
        y = conv1x1_library.reference(**x)
        return {"y": y, "sum": y.sum((0, 2, 3))}
    operands = (x["x"], x["weight"], x.get("scale"), x.get("bias"))
    y, statistics = Conv1x1.apply(*operands, _chosen(call, backend))
    return {"y": y, "sum": _checked_sum(call, y, statistics)}


def _join_conv1x1(call: Call, backend: str, x: Results) -> Results:
    if backend == "reference":
        joined = residual_launch.reference(**{k: v for k, v in x.items() if k != "weight"})
        z = conv1x1_library.reference(joined, x["weight"])
        return {"x": joined, "z": z, "sum": z.sum((0, 2, 3))}
    joined, z, statistics = Join.apply(
        *(x[name] for name in ("y", "scale", "bias", "residual")),
        *(x.get(name) for name in ("residual_scale", "residual_bias")),
        x["weight"],
        _chosen(call, backend),
    )
    return {"x": joined, "z": z, "sum": _checked_sum(call, z, statistics)}


def _product_join(call: Call, backend: str, x: Results) -> Results:
    """What stands behind the end of a plain block, and the sum among the statistics."""
    operands = [x[name] for name in ("x", "scale", "bias")]
    vectors = (x["out_scale"], x["out_bias"])
    maps = [x.get("residual_scale"), x.get("residual_bias")]
    if backend == "reference":
        y = conv1x1_library.reference(x["x"], x["weight"], *operands[1:])
        joined = residual_launch.reference(y, *vectors, x["residual"], *maps)
        z = conv1x1_library.reference(joined, x["next_weight"])
        return {"x": joined, "z": z, "sum": z.sum((0, 2, 3)), "sum of y": y.sum((0, 2, 3))}
    passes = _chosen(call, backend)
    operands += [x["weight"], *vectors, x["residual"], *maps]
    joined, statistics = ProductJoin.apply(*operands, passes)
    exact = [value.detach().double() for value in (x["x"], x["weight"], x["scale"], x["bias"])]
    of_y = _checked_sum(call, conv1x1_library.reference(*exact), statistics)
    z, of_z = Conv1x1.apply(joined, x["next_weight"], None, None, passes)
    return {"x": joined, "z": z, "sum": _checked_sum(call, z, of_z), "sum of y": of_y}


def _chosen(call: Call, backend: str) -> Passes:
    """All passes of a 1x1 convolution, or only some; none for PyTorch."""
    if backend != "triton":
        return NO_PASSES
    return Passes(forward=True, input=not call.drop, weight=not call.keep, pointwise=True)


def _block(call: Call, backend: str, x: Results) -> Results:
    """A block in evaluation mode, with positive weights and BatchNorms, in the dtype of `x`."""
    words = [[(k + n) % call.N < max(1, call.N // 2) for n in range(call.N)] for k in range(call.K)]
    block = CodedBottleneck(
        call.N * call.D, call.C, 2, call.N, Codebook(words), stride=call.stride, backend=backend
    )
    with torch.no_grad():
        for index, (name, value) in enumerate(block.state_dict().items()):
            if value.is_floating_point():
                fan = value[0].numel() if value.ndim == 4 else 1
                # Nothing comes near a ReLU's kink, where rounding decides a whole gradient.
                sign = -1 if name.endswith("running_mean") else 1
                value.copy_(sign * call.positive(*value.shape, place=index) / fan)
    block.eval().to(x["x"].dtype).to(x["x"].device)
    y, energies = map_and_energies(
        block, x["x"], **{k: v for k, v in x.items() if k.endswith("mask")}
    )
    assert energies is not None
    return {"y": y, "energies": energies}


INPUTS: dict[str, Callable[[Call], Results]] = {
    "branch_energy": _energy_inputs,
    "coded_aggregate": _aggregate_inputs,
    "coding_loss": _loss_inputs,
    "grouped_conv3x3": _conv_inputs,
    "conv1x1": _conv1x1_inputs,
    "join_conv1x1": _join_inputs,
    "product_join": _product_join_inputs,
    "CodedBottleneck": _block_inputs,
}
RUNS: dict[str, Callable[[Call, Any, Results], Results]] = {
    "branch_energy": _energy,
    "coded_aggregate": _aggregate,
    "coding_loss": _loss,
    "grouped_conv3x3": _conv,
    "conv1x1": _conv1x1,
    "join_conv1x1": _join_conv1x1,
    "product_join": _product_join,
    "CodedBottleneck": _block,
}


def check_extreme(operator: str, call: Call, backend: str, value: float) -> None:
    """Activations of one magnitude: everything is finite, but what half precision cannot hold."""
    run = RUNS[operator]
    inputs = INPUTS[operator](call)
    first = next(iter(inputs))
    inputs[first] = (inputs[first].double() * value).clamp(max=value).to(call.dtype)
    results = gradients(call, inputs, lambda leaves: run(call, backend, leaves))
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = gradients(call, exact, lambda leaves: run(call, "reference", leaves))
    most = torch.finfo(call.dtype).max
    largest = max(float(value.abs().max()) for value in expected.values())
    finite = {name: bool(actual.isfinite().all()) for name, actual in results.items()}
    said = f"{finite}, {largest:.3g} expected of {value} in {call}"
    if call.dtype != torch.float16 or largest < most / 16:
        assert all(finite.values()), said
    elif any(float(expected[k].abs().max()) > torch.finfo(v.dtype).max for k, v in results.items()):
        assert not all(finite.values()), said
