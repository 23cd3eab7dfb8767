"""`coded-resnext doctor`: right now, right quickly, and able to find a fault."""

from __future__ import annotations

import time

import pytest
import torch
from coded_resnext.kernels import gram

from coded_resnext import cli


def test_all_is_well_in_under_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert cli.main(["doctor"]) == 0
    assert time.perf_counter() - start < 10
    output = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in output
    assert "backend        torch: available" in output
    assert "backend        triton: off: " in output
    assert "all operations agree" in output


def test_a_wrong_operation_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grams = gram.branch_grams
    monkeypatch.setattr(gram, "branch_grams", lambda h, n: 1.01 * grams(h, n))
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "WRONG  coded_aggregate torch cpu float64" in output
    assert "ok     coded_aggregate reference cpu float64" in output


def test_a_nan_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grams = gram.branch_grams
    monkeypatch.setattr(gram, "branch_grams", lambda h, n: grams(h, n) * torch.nan)
    assert cli.main(["doctor"]) == 1
    assert "error inf" in capsys.readouterr().out
