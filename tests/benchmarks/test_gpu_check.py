"""The GPU check where there is no GPU: every path of it runs, and it notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import check
import convolutions
import model_check
import operators
import pytest
import stages
import timing
import torch
from operators import OPERATORS, TINY, CodedStage, Tensors, aggregate_by
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
    seconds = ("--seconds", "900")
    result = run("--out", str(tmp_path), "--dry-run", "--random-calls", "8", *seconds)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "this was a dry run" in result.stdout
    assert " 0 wrong" in result.stdout
    state = check.State(tmp_path, dry=True)
    assert state.stages == dict.fromkeys(check.STAGES, "finished")
    said = {stage: {row["what"]: row for row in state.rows(stage)} for stage in check.STAGES}
    left_out = [w for stage in said.values() for w, r in stage.items() if r.get("left_out")]
    assert left_out == ["kernels"]
    assert said["headline"]["timm, torch, as it is"]["ms"] > 0
    compiled = {f"compiled network, {kind}" for kind in ("coded", "plain")}
    assert said["build"].keys() == {"kernels", *compiled}
    dtypes = ("bfloat16", "float16", "float32")
    names = [operator.name for operator in OPERATORS]
    assert said["right"].keys() >= {
        f"{n}, {p.name}, {d}" for n in names for p in TINY for d in dtypes
    }
    assert said["right"].keys() >= {
        f"evaluation, {block.name}, {backend}, bfloat16"
        for block in model_check.TINY_BLOCKS
        for backend in ("fused", "triton")
    }
    assert said["right"].keys() >= {f"{name}, compilation" for name in names}
    assert said["right"]["random calls"]["tried"] == dict.fromkeys(strategies.OPERATORS, 1)
    assert said["headline"]["coded, train/imagenet.py's step, graph"]["recorded"]
    assert said["headline"]["coded, triton, as it is"]["ms"] > 0
    assert {each["name"] for each in said["profile"]["coded, triton"]["kernels"]} >= {"batch_norm"}
    assert all(said["operators"][f"{name}, {TINY[0].name}"]["ms"]["kernel"] > 0 for name in names)
    assert said["guard"]["accuracy guard"]["fused"] > 0


STAGE = """
import json, os, sys, time
from pathlib import Path
stage = sys.argv[sys.argv.index("--stage") + 1]
out = Path(sys.argv[sys.argv.index("--out") + 1]) / f"dry_run_gpu_check_{stage}.jsonl"
with out.open("a") as file:
    print(json.dumps({"what": stage, "wrong": ["a fault"] if stage == "right" else []}), file=file)
    file.write('{"what": "half a li')
if stage == "headline":
    os.kill(os.getpid(), 9)
if stage == "profile":
    raise ValueError
if stage == "operators":
    time.sleep(60)
"""


def test_a_stage_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is killed, one that raises, one out of time; and they alone are run again."""
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.setattr(check, "__file__", str(tmp_path / "stage.py"))
    monkeypatch.setattr(check, "GRACE", 0)
    command = ["check.py", "--out", str(tmp_path), "--dry-run", "--seconds", "2"]
    monkeypatch.setattr(sys, "argv", command)
    assert check.main() == 1
    state = check.State(tmp_path, dry=True)
    assert state.stages == {
        **dict.fromkeys(("build", "right", "networks", "guard"), "finished"),
        "headline": "killed by SIGKILL",
        "profile": "exit status 1",
        "operators": "out of time",
    }
    for stage in check.STAGES:
        assert [row["what"] for row in state.rows(stage)] == [stage]
    assert "WRONG: right: right: a fault" in capsys.readouterr().out
    (tmp_path / "stage.py").write_text(STAGE.partition("\nif stage ==")[0])
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    assert check.main() == 1  # The fault is still there.
    begun = [line for line in capsys.readouterr().out.splitlines() if "at most" in line]
    assert [line.split()[1] for line in begun] == ["headline,", "profile,", "operators,"]
    assert check.State(tmp_path, dry=True).stages == dict.fromkeys(check.STAGES, "finished")
    monkeypatch.setattr(sys, "argv", [*command, "--only", "build", "guard"])
    state.path("right").unlink()
    assert check.main() == 0


def test_a_check_fits_into_eight_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its estimates, and where every stage hangs, which then leaves the others theirs."""
    estimated = {stage: stages.expected(stage) for stage in check.STAGES}
    assert min(estimated.values()) > stages.START
    assert sum(estimated.values()) <= check.SECONDS - check.GRACE
    clock, limits = [100.0], {}

    def hangs(stage: str, _arguments: Any, limit: float) -> str:
        limits[stage] = limit
        clock[0] += limit + check.GRACE
        return "out of time"

    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(check, "started", hangs)
    monkeypatch.setattr(sys, "argv", ["check.py", "--out", str(tmp_path), "--dry-run"])
    assert check.main() == 1
    assert clock[0] - 100 <= check.SECONDS
    assert all(limit > estimated[stage] - check.GRACE - 0.1 for stage, limit in limits.items())
    assert list(limits) == list(check.STAGES)
    head, *lines = capsys.readouterr().out.splitlines()
    minutes = f"{sum(estimated.values()) / 60:.1f}"
    assert head.startswith(f"by estimate {minutes} minutes on an H100, of 8: build 1")
    for stage, seconds in estimated.items():
        assert f"--- {stage}, about {seconds:.0f} s, at most {limits[stage]:.0f} s" in lines
        taken = limits[stage] + check.GRACE
        said = f"{stage} out of time, {taken:.0f} s for {seconds:.0f}"
        assert said in " ".join("\n".join(lines).split())
    assert f"8.0 minutes, by estimate {minutes}; stages:" in lines


def test_a_row_that_raises_is_a_fault_and_the_stage_goes_on() -> None:
    task = stages.Task(dry=True, deadline=timing.Deadline(5))

    def fail() -> Any:
        raise RuntimeError("an illegal address")

    calls = [stages.Call("first", fail, 1.0), stages.Call("second", lambda: {"ms": 1.0}, 1.0)]
    rows = list(task.rows(calls))
    assert rows[0]["wrong"] == ["RuntimeError: an illegal address"]
    assert rows[1] == {"what": "second", "ms": 1.0}
    late = stages.Task(dry=True, deadline=timing.Deadline(-1))
    assert list(late.rows([stages.Call("third", fail, 1.0)])) == [
        {"what": "third", "left_out": "time was up"}
    ]


def test_a_machine_without_timm_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    task = stages.Task(dry=False, deadline=timing.Deadline(5))
    *_, last = stages.headline(task)
    assert list(task.rows([last])) == [{"what": "timm, torch", "left_out": "timm is not installed"}]


def test_the_summary_sets_the_best_of_each_beside_each_other(tmp_path: Path) -> None:
    state = check.State(tmp_path, dry=True)
    rows = [
        {"what": name, "ms": ms, "host_ms": 1.0, "images_per_second": 256e3 / ms}
        for name, ms in (
            ("plain, torch, graph", 43.0),
            ("plain, torch, compiled, as it is", 36.0),
            ("coded, triton, graph", 24.0),
            ("coded, torch, graph", 51.0),
        )
    ]
    state.path("headline").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"what": "1x1 convolution", "pass": name, "over_floor": over}
        for name, over in (("forward", 1.5), ("input", 2.25), ("weight", None))
    ]
    state.path("operators").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = check.summary(state)
    assert (
        "    1x1 convolution, input: 2.25 of its floor\n    1x1 convolution, forward: 1.50" in text
    )
    assert "best coded 24.0 ms (coded, triton, graph), best plain 36.0 ms" in text
    assert "coded is 1.50 times as fast" in text


def altered(factor: float) -> operators.Form:
    """The aggregate with its output off by a factor."""

    def kernel(inputs: Tensors, stage: CodedStage) -> tuple[Tensor, ...]:
        y, energies = AGGREGATE.kernel(inputs, stage)
        return y * factor, energies

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_agrees(dtype: torch.dtype) -> None:
    result = operators.compare(AGGREGATE, TINY[1], dtype, CPU, samples=1)
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
    faults = operators.compare(wrong, TINY[0], dtype, CPU, samples=2)["wrong"]
    assert any(fault.startswith("output 0: error") for fault in faults)
    assert any(fault.startswith("gradient of weight: error") for fault in faults)


def test_parts_make_the_whole() -> None:
    inputs = operators.inputs_of(AGGREGATE, TINY[0], torch.float64, CPU)
    upstream = operators.upstream_of(AGGREGATE.definition(inputs, TINY[0]))
    whole = operators.evaluate(AGGREGATE, AGGREGATE.definition, TINY[0], inputs, upstream)
    parts = operators.evaluate_in_parts(
        AGGREGATE, TINY[0], inputs, upstream, torch.float64, samples=2
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)


def test_other_bits_are_found() -> None:
    calls = []

    def unsteady(inputs: Tensors, stage: CodedStage) -> tuple[Tensor, ...]:
        calls.append(None)
        return altered(1.5 if len(calls) == 4 else 1.0)(inputs, stage)

    steady = operators.repeats(AGGREGATE, TINY[0], torch.float32, CPU, times=5)
    assert steady["wrong"] == []
    actual = operators.repeats(
        replace(AGGREGATE, kernel=unsteady), TINY[0], torch.float32, CPU, times=5
    )
    assert "output 0: other bits in one of 5 runs" in actual["wrong"]


def test_what_compilation_changes_is_found() -> None:
    def kernel(inputs: Tensors, stage: CodedStage) -> tuple[Tensor, ...]:
        factor = 2.0 if torch.compiler.is_compiling() else 1.0
        return altered(factor)(inputs, stage)

    wrong = replace(AGGREGATE, kernel=kernel)
    result = operators.compiled(wrong, TINY[0], torch.float32, CPU, "aot_eager")
    assert any(fault.startswith("output 0") for fault in result["wrong"])


def test_a_faulty_registration_is_found() -> None:
    @torch.library.custom_op("coded_resnext_test::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    @doubled.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0])

    checked = replace(AGGREGATE, opchecks=lambda inputs, _stage: [(doubled, (inputs["weight"],))])
    (result,) = operators.registration(checked, TINY[0], torch.float32, CPU)
    assert any(fault.startswith("test_faketensor") for fault in result["wrong"])


def test_when_time_is_up_the_rest_is_named() -> None:
    rows = operators.measure(
        AGGREGATE, TINY[0], torch.float32, CPU, 1e12, timing.Deadline(minutes=-1)
    )
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    assert all(row["ms"] == {} for row in rows)
    assert rows[0]["left_out"]["kernel"] == "time was up"
    assert set(rows[0]["left_out"]) == {"kernel", "replaced", "gram", "definition"}


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
    kind = convolutions.RecomputedCase
    case = kind(kind.tiny[0], torch.bfloat16, CPU)
    assert convolutions.check_case(case, repeats=2)["wrong"] == []
    right = getattr(convolutions, name)

    def wrong(*arguments: Any) -> Any:
        actual = right(*arguments)
        if convolutions.KERNELS not in [each for each in arguments if isinstance(each, Passes)]:
            return actual
        return tree_map_only(Tensor, lambda v: v * 1.1 if v.is_floating_point() else v, actual)

    monkeypatch.setattr(convolutions, name, wrong)
    faults = convolutions.check_case(case, repeats=2, only=[which])["wrong"]
    assert any(f"{which} {result}: error" in fault for fault in faults), faults


@pytest.mark.parametrize("block", model_check.TINY_BLOCKS, ids=lambda block: block.name)
def test_a_block_that_evaluates_otherwise_is_wrong(
    block: model_check.EvaluatedBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = model_check.check_block(block, torch.bfloat16, "fused", CPU, repeats=2)
    assert row["wrong"] == []
    assert set(row["errors"]) == ({"y", "energies"} if block.active else {"y"})
    fold = fused_block.fold

    def faulty(*arguments: Any) -> Any:
        folded = fold(*arguments)
        return folded._replace(bias=folded.bias + 0.2)

    monkeypatch.setattr(fused_block, "fold", faulty)
    row = model_check.check_block(block, torch.bfloat16, "fused", CPU, repeats=2)
    assert any("y: error" in fault for fault in row["wrong"])


def test_ratios_and_the_least_time() -> None:
    (row, _) = operators.measure(
        AGGREGATE, TINY[0], torch.float32, CPU, 1e12, timing.Deadline(minutes=5)
    )
    # h [3, 16, 5, 5], y [3, 24, 5, 5] and the weight [24, 16], each once.
    assert row["least_bytes"] == 4 * (3 * 16 * 25 + 3 * 24 * 25 + 24 * 16)
    assert row["floor_ms"] == pytest.approx(row["least_bytes"] / 1e9)
    assert row["over_floor"] == pytest.approx(row["ms"]["kernel"] / row["floor_ms"])
    assert row["over_kernel"]["definition"] == pytest.approx(
        row["ms"]["definition"] / row["ms"]["kernel"]
    )


def test_the_guard_misses_what_trains_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 1.2, 0.9, 1.4, 1.0, 1.2, 0.9, 1.2])
    monkeypatch.setattr(model_check, "final_loss", lambda *_: next(losses))
    assert model_check.guard(dry=True)["kept"] is False
    assert model_check.guard(dry=True)["kept"] is True
