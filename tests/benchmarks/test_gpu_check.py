"""The GPU check where there is no GPU: every path of it runs, and it notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import agreement
import block_check
import block_tail
import check
import model_check
import pytest
import timing
import torch
from operators import OPERATORS, TINY, Place, Tensors, aggregate_by
from pass_check import KERNELS, check_call
from support import strategies
from torch import Tensor
from torch.utils._pytree import tree_map_only

from coded_resnext.kernels.rows import Passes
from coded_resnext.models.fused import block as fused_block

SCRIPT = Path(check.__file__)
CPU = torch.device("cpu")
# The Gram form in the kernel's place: what is tested here is what checks it.
AGGREGATE = replace(
    next(operator for operator in OPERATORS if operator.name == "coded_aggregate"),
    kernel=aggregate_by("torch"),
)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "new"))
    assert result.returncode == 2
    assert "no GPU was available" in result.stderr
    content = json.loads((tmp_path / "new" / "gpu_check.json").read_text())
    assert content["gpu"] is None
    assert "nothing was checked" in content["reason"]
    assert content["machine"]["versions"]["triton"]


@pytest.mark.long
def test_a_dry_run_takes_every_path(tmp_path: Path) -> None:
    result = run("--out", str(tmp_path), "--dry-run", "--random-calls", "8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "this was a dry run" in result.stdout
    assert "0 wrong" in result.stdout
    content = json.loads((tmp_path / "dry_run_gpu_check.json").read_text())
    checked = {(row["operator"], row["place"], row["dtype"]) for row in content["agreement"]}
    names = {operator.name for operator in OPERATORS}
    dtypes = {"bfloat16", "float16", "float32"}
    assert checked == {(n, p.name, d) for n in names for p in TINY for d in dtypes}
    timed = {(row["operator"], row["place"], row["dtype"], row["pass"]) for row in content["times"]}
    assert timed == {
        (*key, way) for key in checked if key[1] == TINY[0].name for way in ("forward", "backward")
    }
    assert all(row["ms"]["kernel"] > 0 for row in content["times"])
    assert any("compiled definition" in row["ms"] for row in content["times"])
    assert {row["operator"] for row in content["compilation"]} == names
    assert len(content["registration"]) >= 4
    assert content["left_out"] == []
    blocks = {(row["block"], row["backend"]) for row in content["blocks"]["checks"]}
    assert blocks == {(b.name, name) for b in block_check.TINY for name in ("fused", "triton")}
    tried = dict.fromkeys(strategies.OPERATORS, 1)
    assert content["random_calls"] == {"tried": tried, "seeds": [0]}
    assert content["models"]["left_out"] == []
    assert {row["contender"] for row in content["models"]["rows"]} >= {"coded, fused, eager, nhwc"}
    assert content["models"]["guard"]["fused"] > 0


def altered(factor: float) -> agreement.Form:
    """The aggregate with its output off by a factor."""

    def kernel(inputs: Tensors, place: Place) -> tuple[Tensor, ...]:
        y, energies = AGGREGATE.kernel(inputs, place)
        return y * factor, energies

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_agrees(dtype: torch.dtype) -> None:
    result = agreement.compare(AGGREGATE, TINY[1], dtype, CPU, samples=1)
    assert result["wrong"] == []
    assert set(result["errors"]) == {
        "output 0",
        "output 1",
        "gradient of h",
        "gradient of weight",
    }


@pytest.mark.parametrize(
    ("factor", "dtype"),
    [(1.0001, torch.float32), (1.1, torch.bfloat16), (float("nan"), torch.float32)],
)
def test_a_wrong_kernel_is_found(factor: float, dtype: torch.dtype) -> None:
    wrong = replace(AGGREGATE, kernel=altered(factor))
    faults = agreement.compare(wrong, TINY[0], dtype, CPU, samples=2)["wrong"]
    assert any(fault.startswith("output 0: error") for fault in faults)
    assert any(fault.startswith("gradient of weight: error") for fault in faults)


def test_parts_make_the_whole() -> None:
    inputs = agreement.inputs_of(AGGREGATE, TINY[0], torch.float64, CPU)
    upstream = agreement.upstream_of(AGGREGATE.definition(inputs, TINY[0]))
    whole = agreement.evaluate(AGGREGATE, AGGREGATE.definition, TINY[0], inputs, upstream)
    parts = agreement.evaluate_in_parts(
        AGGREGATE, TINY[0], inputs, upstream, torch.float64, samples=2
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)


def test_other_bits_are_found() -> None:
    calls = []

    def unsteady(inputs: Tensors, place: Place) -> tuple[Tensor, ...]:
        calls.append(None)
        return altered(1.5 if len(calls) == 4 else 1.0)(inputs, place)

    steady = agreement.repeats(AGGREGATE, TINY[0], torch.float32, CPU, times=5)
    assert steady["wrong"] == []
    actual = agreement.repeats(
        replace(AGGREGATE, kernel=unsteady), TINY[0], torch.float32, CPU, times=5
    )
    assert "output 0: other bits in one of 5 runs" in actual["wrong"]


def test_what_compilation_changes_is_found() -> None:
    def kernel(inputs: Tensors, place: Place) -> tuple[Tensor, ...]:
        factor = 2.0 if torch.compiler.is_compiling() else 1.0
        return altered(factor)(inputs, place)

    wrong = replace(AGGREGATE, kernel=kernel)
    result = agreement.compiled(wrong, TINY[0], torch.float32, CPU, "aot_eager")
    assert any(fault.startswith("output 0") for fault in result["wrong"])


def test_a_faulty_registration_is_found() -> None:
    @torch.library.custom_op("coded_resnext_test::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    @doubled.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0])

    checked = replace(AGGREGATE, opchecks=lambda inputs, _place: [(doubled, (inputs["weight"],))])
    (result,) = agreement.registration(checked, TINY[0], torch.float32, CPU)
    assert any(fault.startswith("test_faketensor") for fault in result["wrong"])


def test_when_time_is_up_the_rest_is_named() -> None:
    rows = timing.measure(
        AGGREGATE, TINY[0], torch.float32, CPU, 1e12, None, timing.Deadline(minutes=-1)
    )
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    assert all(row["ms"] == {} for row in rows)
    assert rows[0]["left_out"]["kernel"] == "time was up"
    assert set(rows[0]["left_out"]) == {"kernel", "replaced", "gram", "definition"}
    empty = {name: [] for name in ("agreement", "repeats", "registration", "compilation")}
    results = {**empty, "times": rows, "criteria": [], "wrong": [], "dry_run": False}
    results |= {"kernels_found": 3, "kernels_compiled": 0}
    results["grouped"] = {"checks": [], "times": [], "verdicts": [], "left_out": ["a layer"]}
    results["products"] = {"checks": [], "times": [], "left_out": ["another layer"]}
    results["blocks"] = {"checks": []}
    results["models"] = model_check.check_models(dry=True, deadline=timing.Deadline(minutes=-1))
    assert results["models"]["rows"] == []
    assert "coded, fused, eager, nhwc" in results["models"]["left_out"]
    text = check.report({**results, "left_out": ["the kernel: time was up"]})
    assert "left out: the kernel: time was up" in text
    assert "left out, time was up: a layer" in text
    assert "left out, time was up: another layer" in text
    assert "left out, time was up: coded, fused, eager, nhwc" in text
    assert "training beside plain, compiled: at least 1.25: not measured" in text
    assert "accuracy guard left out: time was up" in text


@pytest.mark.parametrize(
    ("name", "which", "result"),
    [
        ("product_sums", "sums", "sums"),
        ("statistics", "statistics", "sum"),
        ("backward", "gradient", "input"),
        ("join", "join", "joined"),
    ],
)
def test_a_tail_that_is_wrong_is_found(
    name: str, which: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass in bfloat16, off by a tenth where kernels run."""
    call = block_tail.Call(block_tail.TINY[0], torch.bfloat16, CPU)
    assert check_call(call, block_tail.PASSES, repeats=2)["wrong"] == []
    right = getattr(block_tail, name)

    def wrong(*arguments: Any) -> Any:
        actual = right(*arguments)
        if KERNELS not in [each for each in arguments if isinstance(each, Passes)]:
            return actual
        return tree_map_only(Tensor, lambda v: v * 1.1 if v.is_floating_point() else v, actual)

    monkeypatch.setattr(block_tail, name, wrong)
    faults = check_call(call, [which], repeats=2)["wrong"]
    assert any(f"{which} {result}: error" in fault for fault in faults), faults


@pytest.mark.parametrize("block", block_check.TINY, ids=lambda block: block.name)
def test_a_block_that_evaluates_otherwise_is_wrong(
    block: block_check.EvaluatedBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = block_check.check_block(block, torch.bfloat16, "fused", CPU, repeats=2)
    assert row["wrong"] == []
    assert set(row["errors"]) == ({"y", "energies"} if block.active else {"y"})
    fold = fused_block.fold

    def faulty(*arguments: Any) -> Any:
        folded = fold(*arguments)
        return folded._replace(bias=folded.bias + 0.2)

    monkeypatch.setattr(fused_block, "fold", faulty)
    row = block_check.check_block(block, torch.bfloat16, "fused", CPU, repeats=2)
    assert any("y: error" in fault for fault in row["wrong"])


def test_ratios_and_the_least_time() -> None:
    (row, _) = timing.measure(
        AGGREGATE, TINY[0], torch.float32, CPU, 1e12, None, timing.Deadline(minutes=5)
    )
    # h [3, 16, 5, 5], y [3, 24, 5, 5] and the weight [24, 16], each once.
    assert row["least_bytes"] == 4 * (3 * 16 * 25 + 3 * 24 * 25 + 24 * 16)
    assert row["floor_ms"] == pytest.approx(row["least_bytes"] / 1e9)
    assert row["over_floor"] == pytest.approx(row["ms"]["kernel"] / row["floor_ms"])
    assert row["over_kernel"]["definition"] == pytest.approx(
        row["ms"]["definition"] / row["ms"]["kernel"]
    )


def test_criteria_are_judged() -> None:
    row = {
        "operator": "coded_aggregate",
        "place": "32x4d c4 160px",
        "dtype": "bfloat16",
        "pass": "forward",
        "over_kernel": {"replaced": 1 / 1.2, "definition": 7.0},
    }
    other = {**row, "dtype": "float16"}
    judged = {item["figure"]: item for item in check.criteria([row, other])}
    assert judged["over_replaced"]["kept"] is True
    assert judged["over_replaced"]["measured"] == pytest.approx(1.2)
    assert judged["definition"]["kept"] is False
    missing = check.criteria([{**row, "over_kernel": {}}])
    assert [item["kept"] for item in missing] == [None, None]


def test_criteria_of_networks_are_judged() -> None:
    def row(contender: str, train: float, infer: float, memory: float) -> dict[str, object]:
        figures = (model_check.TRAIN, model_check.INFER, model_check.MEMORY)
        return {
            "contender": contender,
            "wrong": None,
            **dict(zip(figures, (train, infer, memory), strict=True)),
        }

    rows = [
        row("plain, torch, eager, nchw", 60, 200, 900),
        row("plain, torch, compiled default, nhwc", 100, 300, 800),
        row("plain, fused, eager, nhwc", 130, 420, 700),
        row("coded, fused, eager, nhwc", 126, 440, 901),
        row("coded, torch, eager, nhwc", 50, 460, 600),
        row("coded, reference, eager, nhwc", 10, 30, 5000),
        row("coded, reference, compiled default, nhwc", 150, 500, 500),
        {"contender": "plain, triton, eager, nhwc", "wrong": "logits are apart"},
    ]
    actual = model_check.judge(rows)
    measured = [1.26, 126 / 130, 12.6, 901 / 900, 460 / 300]
    assert [item["measured"] for item in actual] == pytest.approx(measured)
    assert [item["kept"] for item in actual] == [True, False, True, False, True]
    assert {item["kept"] for item in model_check.judge([])} == {None}


def test_the_guard_misses_what_trains_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 1.2, 0.9, 1.4, 1.0, 1.2, 0.9, 1.2])
    monkeypatch.setattr(model_check, "final_loss", lambda *_: next(losses))
    assert model_check.guard(dry=True)["kept"] is False
    assert model_check.guard(dry=True)["kept"] is True
