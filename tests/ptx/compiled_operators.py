"""The project's kernels as compiled, through its operators, against the float64 definitions.

The cases are those of tests/support/cases, in every dtype that the kernels take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.cases import coded, conv1x1, fused
from support.cases.conv1x1 import ProductCase, called
from support.cases.conv3x3 import GroupedCase, defined
from support.cases.differentiable import End
from support.guarded_memory import guarded_memory
from support.helpers import TOLERANCES, map_and_energies, relative_error
from torch import Tensor

from coded_resnext.kernels import branch_energy, grouped_conv3x3, replay
from coded_resnext.kernels.coded.operator import normalize_branches
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.residual import launch as residual_launch
from coded_resnext.kernels.rows import ALL_PASSES, Plan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What operators allocate holds poison, so that a read before a store is seen."""
    with guarded_memory():
        yield


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Of float32; by default it is TF32, as of PyTorch's convolutions."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def named(cases: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative_error(actual[name].double(), expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


def unaligned(x: Tensor, elements: int) -> Tensor:
    """The same channels-last map, some elements behind an aligned address."""
    rows = x.permute(0, 2, 3, 1)
    flat = torch.zeros(rows.numel() + elements, dtype=x.dtype)
    flat[elements:] = rows.flatten()
    return flat[elements:].view(rows.shape).permute(0, 3, 1, 2)


# ---- coded

CODED = [case for case in coded.CASES if case.name != "concat"] + coded.KERNEL_CASES


@every_dtype
@named(CODED)
def test_coded_aggregate(case: coded.Case, dtype: torch.dtype) -> None:
    actual = coded.outputs_and_gradients(case, dtype, "triton", dtype)
    expected = coded.outputs_and_gradients(case, torch.float64, "reference", dtype)
    check(actual, expected, TOLERANCES[dtype])


def behind_a_map(
    case: coded.Case, dtype: torch.dtype, like: torch.dtype, elements: int = 0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Activations and weight in a dtype, and BatchNorm's affine map; all have gradients."""
    h, weight = case.inputs(like)
    h = unaligned(h, elements) if elements else h
    generator = torch.Generator().manual_seed(1)
    scale, bias = torch.randn(2, case.N * case.D, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [h.to(dtype), weight.to(dtype), scale.to(wide), bias.to(wide)]
    keep = case.masks().get("keep_mask")
    options = {"keep_mask": keep} if keep is not None else {}
    return [tensor.requires_grad_() for tensor in tensors], options


@every_dtype
@pytest.mark.parametrize("elements", [0, 1, 4], ids=["aligned", "1 element off", "4 elements off"])
@named(coded.KERNEL_CASES)
def test_energies_behind_batch_norm(case: coded.Case, elements: int, dtype: torch.dtype) -> None:
    results = []
    for own, backend in ((dtype, "triton"), (torch.float64, "reference")):
        leaves, options = behind_a_map(case, own, dtype, elements)
        h, weight, scale, bias = leaves
        energy = branch_energy(
            h, weight, case.N, scale=scale, bias=bias, backend=backend, **options
        )
        grad = torch.randn(energy.shape, generator=torch.Generator().manual_seed(2)).to(energy)
        grads = torch.autograd.grad(energy, leaves, grad)
        names = ("energies", "grad_h", "grad_weight", "grad_scale", "grad_bias")
        results.append(dict(zip(names, (energy, *grads), strict=True)))
    check(*results, TOLERANCES[dtype])


@every_dtype
@named(coded.KERNEL_CASES)
def test_normalisation_behind_batch_norm(case: coded.Case, dtype: torch.dtype) -> None:
    results = []
    masks = {name: mask.double() for name, mask in case.masks().items()}
    for own in (dtype, torch.float64):
        leaves, _ = behind_a_map(case, own, dtype)
        h, weight, scale, bias = leaves
        per_branch = weight[:, :, 0, 0].unflatten(1, (case.N, -1)).transpose(0, 1)
        given = [masks.get(name) for name in ("drop_mask", "keep_mask")]
        wide = [mask if mask is None else mask.to(scale.dtype) for mask in given]
        scaled, energies, _ = normalize_branches(h, per_branch, scale, bias, *wide)
        generator = torch.Generator().manual_seed(3)
        grads = [
            torch.randn(value.shape, generator=generator).to(dtype).to(value)
            for value in (scaled, energies)
        ]
        values = (scaled, energies, *torch.autograd.grad((scaled, energies), leaves, grads))
        names = ("scaled", "energies", "grad_h", "grad_weight", "grad_scale", "grad_bias")
        results.append(dict(zip(names, values, strict=True)))
    check(*results, TOLERANCES[dtype])


# ---- grouped convolutions

GROUPED = [
    *(
        GroupedCase(
            f"width_{width}_stride_{stride}", N=32 // width or 1, D=width, H=5, stride=stride
        )
        for width in (1, 3, 4, 6, 8, 11, 12, 16, 22, 24, 32, 44)
        for stride in (1, 2)
    ),
    GroupedCase("one_pixel", H=1, W=1),
    GroupedCase("two_parts_of_rows", H=20, W=3, B=1),
    GroupedCase("plain", affine=False, statistics=False, H=5, W=3),
    GroupedCase("affine_alone_stride_2", statistics=False, H=3, stride=2),
    GroupedCase("statistics_alone", affine=False, H=3),
]


def convolved(case: GroupedCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, statistics and all gradients by the kernels."""
    inputs = case.inputs(dtype)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    maps = {name: leaves[name] for name in ("scale", "bias") if name in leaves}
    y, statistics = grouped_conv3x3(
        leaves["x"],
        leaves["weight"],
        case.N,
        stride=case.stride,
        statistics=case.statistics,
        backend="triton",
        **maps,
    )
    results = {"y": y} | ({} if statistics is None else {"statistics": statistics})
    given = case.output_gradients(dtype)[: len(results)]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), given)
    return results | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


@every_dtype
@named(GROUPED)
def test_grouped_convolution(case: GroupedCase, dtype: torch.dtype) -> None:
    expected = defined(case, case.inputs(dtype), rounded=True)
    with convolutions_in("ieee"):
        check(convolved(case, dtype), expected, TOLERANCES[dtype])


def test_float32_convolutions_follow_the_precision_of_pytorch() -> None:
    """IEEE where it is asked for, TF32, with its ten bits, by default."""
    case = GroupedCase("precision", N=2, D=16, H=5)
    expected = defined(case, case.inputs(torch.float32), rounded=True)
    for precision, low, high in (("ieee", 0.0, 1e-5), ("tf32", 1e-5, 1e-2)):
        with convolutions_in(precision):
            y = convolved(case, torch.float32)["y"]
        assert low <= relative_error(y.double(), expected["y"]) < high


def test_float32_energies_follow_the_precision_of_pytorch() -> None:
    """IEEE by default, as of every matrix product."""
    case = coded.Case("precision", N=4, D=16, H=5, W=5)
    expected = coded.outputs_and_gradients(case, torch.float64, "reference", torch.float32)
    for precision, low, high in (("highest", 0.0, 1e-5), ("high", 1e-5, 1e-2)):
        torch.set_float32_matmul_precision(precision)
        try:
            actual = coded.outputs_and_gradients(case, torch.float32, "triton", torch.float32)
        finally:
            torch.set_float32_matmul_precision("highest")
        error = relative_error(actual["energies"].double(), expected["energies"])
        assert low <= error < high


# ---- 1x1 convolutions between BatchNorms, and the end of a block

PRODUCTS = [
    ProductCase("one_pixel", I=16, O=24, B=1, H=1, W=1),
    ProductCase("odd_channels", I=7, O=5, B=3, H=3, W=3),
    ProductCase("steps_over_channels", I=96, O=72),
    ProductCase("plain", affine=False, statistics=False),
    ProductCase("deferred", gain=True, I=264, O=136, B=1, H=3, W=3),
    ProductCase("join", join=True),
    ProductCase("join_columns", join=True, I=72, O=136, B=1, affine=False),
    ProductCase("join_without_signs", join=True, I=20, O=7, signs=False),
    ProductCase("join_of_two_tiles", join=True, I=256, O=40, B=1, H=9, W=8),
]


@every_dtype
@named(PRODUCTS)
def test_pointwise_convolution(case: ProductCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    actual = called(case, inputs, ALL_PASSES)
    check(actual, conv1x1.defined(case, inputs), TOLERANCES[dtype])


@every_dtype
@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "mapped"])
@pytest.mark.parametrize("shape", [(3, 7, 5, 19), (2, 200, 3, 3), (1, 24, 1, 257)], ids=str)
def test_join(shape: tuple[int, ...], mapped: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    vectors = list(torch.randn(4 if mapped else 2, shape[1], generator=generator))
    grad = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for own in (dtype, torch.float64):
        wide = torch.float64 if own == torch.float64 else torch.float32
        leaves = [*(m.to(own) for m in maps), *(v.to(wide) for v in vectors)]
        y, residual, scale, bias, *others = (leaf.requires_grad_() for leaf in leaves)
        given = (y, scale, bias, residual, *(others or (None, None)))
        x = End.apply(*given) if own == dtype else residual_launch.reference(*given)
        grads = torch.autograd.grad(x, leaves, grad.to(own))
        results.append({str(index): value for index, value in enumerate((x, *grads))})
    check(*results, TOLERANCES[dtype])


# ---- blocks


def of_block(case: fused.BlockCase, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A training step, or in evaluation what a block gives without gradients; half precisions are
    those of autocast."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
        if case.train:
            return fused.step_of(case, case.make(), backend, wide)
        block = case.make().to(wide)
        block.backend = backend  # type: ignore[assignment]
        inputs = case.inputs()
        masks = {"keep_mask": inputs["keep_mask"].to(wide)} if case.keep else {}
        with torch.no_grad():
            y, energies = map_and_energies(block, inputs["x"].to(wide), **masks)
    return {"output": y} | ({} if energies is None else {"energies": energies})


@every_dtype
@named(list(fused.CASES))
def test_block(case: fused.BlockCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass by kernels. In half precision a number near 0 may pass a ReLU or not, so that any
    of the results is held against the least exact one of PyTorch; where one has passed the last
    ReLU, whose gradients are then others, the output alone is."""
    plan = Plan(ALL_PASSES, "for this test")
    monkeypatch.setattr(convolution, "planned", lambda *_: plan)
    expected = of_block(case, "reference", torch.float64)
    with convolutions_in("ieee"):
        actual = of_block(case, "triton", dtype)
    eager = of_block(case, "reference", dtype)
    if ((actual["output"] > 0) != (expected["output"] > 0)).any():
        assert dtype.itemsize == 2
        actual, expected = ({"output": each["output"]} for each in (actual, expected))
    worst = max(relative_error(eager[name].double(), value) for name, value in expected.items())
    check(actual, expected, 1e-5 if dtype.itemsize == 4 else 2 * worst)


@named([case for case in fused.CASES if case.name in ("coded, stride 2", "plain, projection")])
def test_a_replayed_block_is_the_block(case: fused.BlockCase) -> None:
    """The third step launches compiled code by its recording, the first one by Triton."""
    replay.forget()
    steps = [of_block(case, "triton", torch.bfloat16) for _ in range(3)]
    recordings = [made for each in replay._MADE for made in each.recordings.values()]
    assert len(recordings) - recordings.count(None) >= 2
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[2][name], value, rtol=0, atol=0, msg=name)
