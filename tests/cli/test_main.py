"""The command line as a whole: help, exit status, one sentence for bad input."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from support.helpers import needs_triton
from support.script_runs import run_here

from coded_resnext import list_models
from coded_resnext.cli import arguments, export, main, report
from coded_resnext.cli import evaluate as evaluate_command
from coded_resnext.deploy.export import OPSET
from coded_resnext.kernels import Backend
from coded_resnext.kernels.prebuilt import FOLDERS_VARIABLE

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("coded-resnext")


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """A parser and all below it, each with the words that lead to it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, (*words, word))


# What Python says of objects, and what argparse and dataclasses have for "nothing".
NOT_FOR_PEOPLE = re.compile(r"<[\w.]+ object at|<(?:class|function|bound)|MISSING|SUPPRESS|%\(\w+")

ALL_PARSERS = dict(parsers(arguments.make_parser()))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.main(["--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    for command in ("codebook", "doctor", "eval", "extract", "info", "predict"):
        assert command in output


def test_no_command_and_an_unknown_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["train-everything"]):
        with pytest.raises(SystemExit) as exit_:
            main.main(words)
        assert exit_.value.code == 2
    assert "invalid choice: 'train-everything'" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", str(tmp_path / "none"), "digits"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coded-resnext: ")
    assert "expected a model file, found none" in error
    assert error.count("\n") == 1


def test_interrupt_has_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("coded_resnext.cli.doctor.run", interrupt)
    assert main.main(["doctor"]) == 130


@pytest.mark.parametrize(
    ("words", "imported"),
    [
        ("-m coded_resnext info digits", "numpy"),
        ("-m coded_resnext info digits", "torch"),
        ("train/digits.py", "numpy"),
        ("train/finetune.py --data-dir x", "torch"),
    ],
)
def test_an_interrupt_while_modules_are_imported_is_one_line(words: str, imported: str) -> None:
    """It was a traceback out of the library that was being imported."""
    command = [sys.executable, "-X", "importtime", *words.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "| " in line and line.split("|")[-1].strip().startswith(f"{imported}."):
                process.send_signal(signal.SIGINT)
                lines += process.stderr
    said = [line for line in lines if not line.startswith("import time:")]
    name = "coded-resnext" if words.startswith("-m") else Path(words.split()[0]).name
    assert (process.returncode, said) == (130, [f"{name}: interrupted\n"])


def test_a_handler_of_somebody_else_stays() -> None:
    """Imports leave the signal as it was, and one that is ignored stays ignored."""
    former = signal.getsignal(signal.SIGINT)
    for handler in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        try:
            with main.ended_by_interrupt():
                ignored = handler is signal.SIG_IGN
                assert (signal.getsignal(signal.SIGINT) is handler) == ignored
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, former)


def test_the_command_is_installed() -> None:
    result = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert "COMMAND" in result.stdout


def test_help_needs_no_pytorch() -> None:
    """It takes seconds to import; no part of the package that needs it is in the way of help."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from coded_resnext.cli.main import main\n"
        "for words in map(str.split, sys.argv[1:]):\n"
        "    try:\n"
        "        print(main([*words, '--help']))\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, words\n"
    )
    # The flags of `train` are the settings of a recipe, whose types need PyTorch.
    asked = [" ".join(words) for words, parser in ALL_PARSERS.items() if parser.add_help]
    assert {"", "export", "codebook", "codebook show"} < set(asked)
    result = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    usages = [line for line in result.stdout.splitlines() if line.startswith("usage: ")]
    assert len(usages) == len(asked)


# What static.py compiles with is Triton's.
SCRIPTS = [
    pytest.param(path, id=path.stem, marks=needs_triton if path.parent.name == "static" else ())
    for folder in ("train", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    and re.search(r"ArgumentParser|train_by_recipe", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_scripts_is_for_people(script: Path) -> None:
    """A setting without a default had `<dataclasses._MISSING_TYPE object at 0x..>` for one."""
    result = run_here(script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    assert NOT_FOR_PEOPLE.findall(result.stdout) == []


def test_help_of_commands_is_for_people() -> None:
    for words, parser in ALL_PARSERS.items():
        assert NOT_FOR_PEOPLE.findall(parser.format_help()) == [], words


def test_what_help_says_is_what_the_modules_have() -> None:
    """The parsers import nothing that needs PyTorch, so that they repeat what is defined there."""
    assert get_args(Backend) == arguments.BACKENDS
    assert list(arguments.NETWORKS) == list_models()
    assert arguments.KERNELS_VARIABLE == FOLDERS_VARIABLE
    parse = arguments.make_parser().parse_args
    assert parse(["export", "RUN"]).opset == OPSET
    for name in export.SUFFIXES:
        assert parse(["export", "RUN", "--format", name]).format == name
    assert f"RUN/{report.REPORT_FILE})" in ALL_PARSERS["report",].format_help()
    sizes = (
        f"{evaluate_command.DIGITS_BATCH} for digits, {evaluate_command.FOLDER_BATCH} for folders"
    )
    assert sizes in " ".join(ALL_PARSERS["eval",].format_help().split())


@pytest.mark.parametrize(
    "words", [words for words, parser in ALL_PARSERS.items() if parser.get_default("function")]
)
def test_every_command_has_its_function(words: tuple[str, ...]) -> None:
    module, name = ALL_PARSERS[words].get_default("function").split(":")
    assert callable(getattr(import_module(f"coded_resnext.cli.{module}"), name))


def run_without_reader(
    *command: str | Path, errors_too: bool = False, unbuffered: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """Run a command as `.. | head -1`, or as `.. 2>&1 | head -1`, whose reader is gone already."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            command,
            stdout=writer,
            stderr=writer if errors_too else subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    finally:
        os.close(writer)


def test_help_that_nobody_reads_ends_quietly() -> None:
    result = run_without_reader(COMMAND, "--help")
    assert (result.returncode, result.stderr) == (main.NOBODY_READS, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("written", ["print('line\\n' * 20_000)", "print('line')"])
def test_output_that_nobody_reads_ends_quietly(unbuffered: str, written: str) -> None:
    """Whether it is noticed while the command runs, or when the buffer is emptied at its end."""
    code = (
        "import sys; from coded_resnext.cli import main\n"
        f"main._run = lambda _: {written} or 0\n"
        "sys.exit(main.main())"
    )
    result = run_without_reader(sys.executable, "-c", code, unbuffered=unbuffered)
    assert (result.returncode, result.stderr) == (main.NOBODY_READS, b"")


def test_an_error_that_nobody_reads_has_the_same_status() -> None:
    code = (
        "import sys; from coded_resnext.cli import main\n"
        "def refuse(_): raise ValueError('a file: damaged')\n"
        "main._run = refuse\n"
        "sys.exit(main.main())"
    )
    result = run_without_reader(sys.executable, "-c", code, errors_too=True)
    assert result.returncode == main.NOBODY_READS


def test_another_broken_pipe_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A connection that the other side has closed is an error, and not the end of the reader."""

    def upload(_: object) -> int:
        raise BrokenPipeError("connection lost")

    monkeypatch.setattr("coded_resnext.cli.doctor.run", upload)
    assert main.main(["doctor"]) == 2
    assert capfd.readouterr().err == "coded-resnext: connection lost\n"
