"""What several tests share: golden tensors, a published layout, relative errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coded_resnext import Codebook
from coded_resnext.kernels.layout import HAS_TRITON
from coded_resnext.models.block import CodedBottleneck, EnergyRecord

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# Of results in a dtype against float64 for inputs that are exact in it. Inputs of products and
# outputs are rounded to the dtype (half a unit in the last place is 5e-4 and 4e-3 for the half
# precisions), a few times in a row; sums are float32 (float64 for float64), of some hundred terms.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

# Of a network's outputs where its sums are made in another order or by other instructions, as
# another processor, version, batch size or memory layout does: 80 and 4500 roundings of the largest
# value, of layers that add up a few hundred terms each, one behind the other.
ANOTHER_ORDER = {torch.float32: 1e-5, torch.float64: 1e-12}

GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
        return json.loads(str(arrays["meta"])), tensors


def map_and_energies(
    block: CodedBottleneck, x: Tensor, **masks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The output of a block, and its energies."""
    record = EnergyRecord()
    return block(x, record=record, **masks), record.energies


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_alike(actual: Tensor, expected: Tensor) -> None:
    """The same by two ways of computing it: equal but for the order in which sums are made.

    `torch.equal` is for what is copied, and for the same instructions on the same data.
    """
    assert actual.dtype == expected.dtype
    error = relative_error(actual, expected)
    assert error < ANOTHER_ORDER[expected.dtype], error


def assert_same_network(actual: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """One that was written and read: its state to the bit, its output to rounding.

    Weights that are read may lie otherwise in memory, where products take other instructions.
    """
    state, wanted = actual.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert_alike(actual(x), expected(x))


def assert_decided_alike(actual: Tensor, expected: Tensor, margins: Tensor, slack: float) -> None:
    """Decisions by two ways of computing: the same, but where rounding may decide.

    Args:
        found, expected: classes, or yes and no.
        margins: by how much each decision was made.
        slack: by how much the two ways may move a margin. One in twenty may be as near as that.
    """
    clear = margins.abs() > slack
    assert clear.double().mean() >= 0.95
    assert torch.equal(actual[clear], expected[clear])


def class_margins(scores: Tensor) -> Tensor:
    """By how much the largest score of each sample exceeds the next, `[B]` of `[B, K]`."""
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; shapes and dtypes must agree."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach(), expected.detach()
    assert actual.isfinite().all()
    scale = max(float(expected.abs().max()), 1e-300)
    return float((actual.to(expected.dtype) - expected).abs().max()) / scale


def imagenet_layout(
    depths: list[int], ratios: list[str], size: int, classes: int
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The published description of a network for ImageNet, and a state dict by its rules.

    By the rules of the published code, not by ours: a block says its channels in and out, its
    width, its stride and its ratio, and no probability; pooling is one layer, so that the
    classifier of the published network is number 21; branches stand below one another in
    `conv_expand`; a plain block has a mask of ones. Channels are `size` times those of a network
    of `size` 1; the published one has 64.
    """
    architecture: list[Any] = [f"conv7_in3_out{size}_str2", f"bn2D_in{size}", "relu"]
    architecture.append("maxPool3_str2_pad1")
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def norm(name: str, channels: int) -> dict[str, torch.Tensor]:
        tensors = {f"{name}.{kind}": drawn(channels) for kind in ("weight", "bias")}
        tensors |= {f"{name}.running_{kind}": drawn(channels) for kind in ("mean", "var")}
        return {**tensors, f"{name}.num_batches_tracked": torch.tensor(7)}

    state = {"net_list.0.weight": drawn(size, 3, 7, 7), **norm("net_list.1", size)}
    channels = size
    for stage, (depth, ratio) in enumerate(zip(depths, ratios, strict=True)):
        active, branches = map(int, ratio.split("/"))
        width, out = (size // 16) << stage, (4 * size) << stage
        mask = torch.ones(classes, branches, dtype=torch.bool)
        if active < branches:
            mask = Codebook.shipped(classes, branches, active, "paper").codewords
        for index in range(depth):
            stride = 2 if stage and not index else 1
            name = f"net_list.{len(architecture)}."
            wide = branches * width
            expand = (branches * out, width) if active < branches else (out, wide)
            state |= {
                f"{name}Mask_perClass": mask,
                f"{name}conv_reduce.weight": drawn(wide, channels, 1, 1),
                **norm(f"{name}bn_reduce", wide),
                f"{name}conv_internal.weight": drawn(wide, width, 3, 3),
                **norm(f"{name}bn_internal", wide),
                f"{name}conv_expand.weight": drawn(*expand, 1, 1),
                **norm(f"{name}bn_expand", out),
            }
            if index == 0:
                skip = f"{name}skip_connection."
                state |= {f"{skip}conv_skip.weight": drawn(out, channels, 1, 1)}
                state |= norm(f"{skip}bn_skip", out)
            architecture.append([channels, out, width, stride, ratio])
            channels = out
    architecture += ["avgPoolWithMean", f"linear_in{channels}"]
    state[f"net_list.{len(architecture) - 1}.weight"] = drawn(classes, channels)
    return architecture, state
