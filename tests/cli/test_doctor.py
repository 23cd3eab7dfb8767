"""`coded-resnext doctor`: right now, right quickly, and able to find a fault."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from support.helpers import needs_triton

from coded_resnext.cli import doctor, main
from coded_resnext.kernels import layout
from coded_resnext.kernels.coded import gram
from coded_resnext.kernels.prebuilt import toolchain


@needs_triton
def test_all_is_well_in_under_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where nobody asked for Triton's interpreter, which would take most of the time.
    monkeypatch.setattr(layout, "interpreted", lambda: False)
    start = time.process_time()
    assert main.main(["doctor"]) == 0
    assert time.process_time() - start < 10
    output = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in output
    assert "backend        torch: available" in output
    assert "backend        triton: off: no CUDA device" in output
    assert "all operations agree" in output


@needs_triton
def test_the_kernels_are_checked_where_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "backend        triton: available" in output
    for label in ("aggregate triton cpu float32", "aggregate triton cpu bfloat16", "loss triton"):
        assert f"ok     coded_{label}" in output or f"ok     coding_{label}" in output


def test_a_wrong_operation_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grams = gram.branch_grams
    monkeypatch.setattr(gram, "branch_grams", lambda h, n: 1.01 * grams(h, n))
    assert main.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "WRONG  coded_aggregate torch cpu float64" in output
    assert "ok     coded_aggregate reference cpu float64" in output


def test_a_nan_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grams = gram.branch_grams
    monkeypatch.setattr(gram, "branch_grams", lambda h, n: grams(h, n) * torch.nan)
    assert main.main(["doctor"]) == 1
    assert "error inf" in capsys.readouterr().out


def test_prebuilt_kernels_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CODED_RESNEXT_KERNELS", str(tmp_path))
    assert list(doctor.prebuilt_kernels()) == [
        f"none prebuilt in {tmp_path}; each is compiled when first used"
    ]
    folder = tmp_path / "sm90"
    (folder / "KEY").mkdir(parents=True)
    (folder / "KEY" / "some.cubin").write_bytes(b"code")
    content = {
        "format": 1,
        "arch": "sm90",
        "toolchain": toolchain(),
        "kernels": {"KEY": {"some.cubin": hashlib.sha256(b"code").hexdigest()}},
        "rows": {"a row": "KEY"},
    }

    def reported() -> str:
        (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")
        (line,) = doctor.prebuilt_kernels()
        return line

    assert reported() == f"1 prebuilt for sm90 in {folder}"
    (folder / "KEY" / "some.cubin").write_bytes(b"c0de")
    assert reported().endswith("1 of them damaged: those are compiled when first used")
    content["toolchain"] = {**toolchain(), "triton": "3.0.0"}
    assert "of no use: they are for {'triton': '3.0.0'" in reported()
    content["format"] = 2
    assert reported().startswith("left out: ")
    monkeypatch.setenv("CODED_RESNEXT_KERNELS", "")
    assert "none prebuilt in no folder" in next(doctor.prebuilt_kernels())
