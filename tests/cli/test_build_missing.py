"""Before a step by the kernels, what was not built is built; tuning says where they win."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coded_resnext import create_model
from coded_resnext.cli.main import main
from coded_resnext.kernels.build.build import BuildError
from coded_resnext.kernels.prebuilt import default_folder
from coded_resnext.training import warm_up, ways
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.ways import Way, choose_way


@pytest.mark.parametrize(
    ("arch", "lacking", "error", "named", "said"),
    [
        ("sm90", ["a kernel"], None, None, "compiling the kernels for sm90, once, into"),
        ("sm90", ["it"], BuildError("no ninja"), None, "as they are needed instead: no ninja"),
        ("sm90", [], None, None, ""),
        ("gfx942", ["a kernel"], None, None, ""),
        # A build would go where nobody looks.
        ("sm90", ["a kernel"], None, "/opt/kernels", ""),
        ("sm90", ["a kernel"], None, "", ""),
        (None, ["a kernel"], None, None, ""),
    ],
)
def test_what_is_missing_is_built_once(
    arch: str | None,
    lacking: list[str],
    error: Exception | None,
    named: str | None,
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

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if named is not None:
        monkeypatch.setenv("CODED_RESNEXT_KERNELS", named)
    monkeypatch.setattr(warm_up, "backends", lambda: {"triton": None})
    monkeypatch.setattr(warm_up, "architecture", lambda _: arch)
    monkeypatch.setattr(warm_up, "missing", lambda *_: lacking)
    monkeypatch.setattr(warm_up, "build", build)
    warm_up.build_kernels(torch.device("cpu") if arch is None else torch.device("cuda", 0))
    assert built == ([(["sm90"], default_folder())] if said else [])
    text = capsys.readouterr().err
    assert said in text
    assert bool(said) == bool(text)
    # Where all is there, nothing is written: the folder may be one that cannot be.
    assert any(tmp_path.iterdir()) == bool(said)


def test_tune_measures_a_network_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ways, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(ways, "open_ways", lambda *_: [Way("torch"), Way("reference")])
    monkeypatch.setattr(ways, "FIRST", 1)
    monkeypatch.setattr(ways, "TIMED", 1)
    command = ["tune", "coded_resnext_digits", "--batch-size", "4", "--dtype", "float32"]
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["way"]["backend"] for row in content["rows"]] == ["torch", "reference"]
    assert content["subject"]["images"] == [4, 1, 8, 8]
    monkeypatch.setattr(ways, "_measure", lambda *_: None)
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "taken: --backend " in text
    assert " times as fast as layer by layer" in text
    assert main([*command, "--anew"]) == 1
    assert "nothing was measured" in capsys.readouterr().err
    # A training of that kind has no need to measure.
    config = TrainingConfig(epochs=3, batch_size=4, lr=0.5, channels_last=True, seed=7)
    model = create_model("coded_resnext_digits")
    assert choose_way(model, 8, replace(config, torchcompile="auto")) is not None
    for flag in ("--batch-size", "--image-size", "--seconds"):
        assert main([*command, flag, "0"]) == 2
        assert f"{flag}: expected more than 0, got 0" in capsys.readouterr().err
    assert main(["tune", str(tmp_path / "nothing")]) == 2
