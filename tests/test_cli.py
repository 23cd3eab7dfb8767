"""The command line as a whole: help, exit status, one sentence for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coded_resnext import cli


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    for command in ("codebook", "doctor", "eval", "extract", "info", "predict"):
        assert command in output


def test_no_command_and_an_unknown_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["train-everything"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
    assert "invalid choice: 'train-everything'" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tmp_path / "none"), "digits"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coded-resnext: ")
    assert "expected a model file, found none" in error
    assert error.count("\n") == 1


def test_interrupt_has_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("coded_resnext.doctor.run", interrupt)
    assert cli.main(["doctor"]) == 130


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("coded-resnext")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "COMMAND" in result.stdout
