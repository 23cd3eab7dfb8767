"""The tuner where there is no GPU: its dry run, its way through the settings, and its verdicts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tune
from operators import OPERATORS, TINY, CodedStage, Tensors
from torch import Tensor

from coded_resnext.kernels import rows
from coded_resnext.kernels.coded import rows as coded_rows
from coded_resnext.kernels.rows import CodedSizes, LaunchRow, Variant

ENERGIES = next(operator for operator in OPERATORS if operator.name == "branch_energy")
KERNEL = "coded.energy:energy_forward"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(tune.__file__)), *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def tuner(operator: Any = ENERGIES, time: Callable[[Any], float] | None = None) -> tune.Tuner:
    return tune.Tuner(operator, TINY[0], torch.bfloat16, torch.device("cpu"), time)


def test_without_a_gpu_it_says_so() -> None:
    result = run("--op", "branch_energy")
    assert result.returncode == 2
    assert "no GPU was available: nothing was timed" in result.stderr


@pytest.mark.long
def test_a_dry_run_tries_every_candidate() -> None:
    result = run("--op", "coded_aggregate", "--stage", "odd", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": right") == 8
    assert "left out" not in result.stdout
    assert "nothing was timed" in result.stdout
    for kernel in ("aggregate_forward", "aggregate_backward", "weighted_gram"):
        assert kernel in result.stdout
    result = run("--op", "coded_aggregate", "--stage", "nowhere", "--dry-run")
    assert result.returncode == 2
    assert "no stage has 'nowhere' in its name" in result.stderr


@pytest.mark.long
def test_the_fastest_settings_are_found_and_can_be_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By times that are made up: best are 2 samples, two steps of the way, and two stages."""

    def time(run: Any) -> float:
        row: LaunchRow = run.__self__.row
        run()
        settings = rows.settings_of(row)
        return abs(settings["SAMPLES"] - 2) + abs(settings["num_stages"] - 2) + 1.0

    of_tuner = tuner(time=time)
    assert of_tuner.kernels == [
        KERNEL,
        "coded.energy:energy_backward",
        "coded.energy:weighted_gram",
    ]
    (line,) = of_tuner.tune(KERNEL)
    assert "1000.0 us, 8000.0 before" in line
    assert rows.TUNED == {}
    table = ast.literal_eval("{" + line.partition("#")[0] + "}")
    ((key, settings),) = table.items()
    assert settings == {"SAMPLES": 2, "num_stages": 2}
    before = of_tuner.run()[1][0].row
    with tune.entered(key, settings):
        after = of_tuner.run()[1][0].row
    assert after == rows.changed(before, settings) != before
    assert of_tuner.run()[1][0].row == before


def test_nothing_is_printed_where_nothing_is_faster() -> None:
    assert tuner(time=lambda _run: 1.0).tune(KERNEL) == []


def test_what_is_wrong_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of four samples give another result, and those of two stages do not compile."""

    def kernel(inputs: Tensors, stage: CodedStage) -> tuple[Tensor, ...]:
        (energies,) = ENERGIES.kernel(inputs, stage)
        settings = dict(next(iter(rows.TUNED.values()), {}))
        if settings.get("num_stages") == 2:
            raise RuntimeError("no such stages\nand more")
        return (energies * (1.1 if settings.get("SAMPLES") == 4 else 1.0),)

    lines = tuner(replace(ENERGIES, kernel=kernel), lambda _run: 1.0).tune(KERNEL)
    assert lines == []
    printed = capsys.readouterr().out
    assert "SAMPLES=4, num_warps=1, num_stages=1: left out: output 0 differs by" in printed
    assert "num_stages=2: left out: RuntimeError: no such stages\n" in printed
    assert "SAMPLES=16, num_warps=1, num_stages=1: 1000.0 us" in printed


def test_candidates_can_be_compiled() -> None:
    constexprs = {"BLOCK_K": 16, "WINDOWS": 1, "PIXELS": 25}
    start = {"BLOCK_P": 32, "SAMPLES": 8, "num_warps": 1, "num_stages": 1}
    actual = tune.neighbours(start, constexprs)
    # No larger tile than the padded map, no second warp for a product of 16 by 16.
    assert actual == [
        {**start, "BLOCK_P": 16},
        {**start, "SAMPLES": 4},
        {**start, "SAMPLES": 16},
        {**start, "num_stages": 2},
    ]
    assert {**start, "num_warps": 2} in tune.neighbours(start, {**constexprs, "WINDOWS": 8})


def test_a_row_says_what_it_is_for() -> None:
    sizes = CodedSizes(branches=32, width=16, channels=1024, pixels=100)
    several = [
        coded_rows.energy_forward(sizes, variant)
        for variant in (
            Variant("bf16"),
            Variant("bf16", affine=True),
            Variant("bf16", keep=True),
            Variant("fp32"),
            Variant("fp32", tf32=True),
        )
    ]
    assert rows.sizes_of(several[0]) == "N=32 D=16 P=100 fp32,bf16,-,-,fp32,- ieee"
    assert len({rows.sizes_of(row) for row in several}) == len(several)


def test_changed_rows_are_whole() -> None:
    sizes = CodedSizes(branches=32, width=16, channels=1024, pixels=100)
    row = coded_rows.energy_forward(sizes, Variant("bf16"))
    other = rows.changed(row, {"BLOCK_P": 32, "num_warps": 2})
    assert dict(other.constexprs) == {**dict(row.constexprs), "BLOCK_P": 32}
    assert [name for name, _ in other.constexprs] == [name for name, _ in row.constexprs]
    assert other.keywords["num_warps"] == 2
    assert other.trip_bytes == row.trip_bytes // 2
    assert other.sample_bytes == row.sample_bytes
    with pytest.raises(ValueError, match=r"settings: expected some of .*BLOCK_P.*, got .'WIDTH'"):
        rows.changed(row, {"WIDTH": 8})
