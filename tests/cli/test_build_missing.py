"""Before a training by the kernels, what was not built is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coded_resnext.cli import build_kernels
from coded_resnext.kernels.build.build import BuildError


@pytest.mark.parametrize(
    ("arch", "lacking", "error", "said"),
    [
        ("sm90", ["a kernel"], None, "compiling the kernels for sm90, once, into"),
        ("sm90", ["a kernel"], BuildError("no ninja"), "as they are needed instead: no ninja"),
        ("sm90", [], None, ""),
        ("gfx942", ["a kernel"], None, ""),
    ],
)
def test_what_is_missing_is_built_once(
    arch: str,
    lacking: list[str],
    error: Exception | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built: list[Any] = []

    def build(*arguments: Any) -> None:
        built.append(arguments)
        if error is not None:
            raise error

    monkeypatch.setattr(build_kernels, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(build_kernels, "missing", lambda *_: lacking)
    monkeypatch.setattr(build_kernels, "build", build)
    build_kernels.build_missing(arch)
    assert built == ([(["sm90"], tmp_path)] if said else [])
    text = capsys.readouterr().err
    assert said in text
    assert bool(said) == bool(text)
