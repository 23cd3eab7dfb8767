"""`coded-resnext report`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from support.report_runs import ODD_NAMES, Run, odd_run

from coded_resnext.cli import main, report
from coded_resnext.interpret.report import gather, render


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run."""
    return odd_run(tmp_path_factory.mktemp("report") / "run")


def test_the_page_is_written_into_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["report", str(run.folder)]) == 0
    page = run.folder / "report.html"
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert page.read_text() == render(gather(run.folder))


def test_json_is_the_content(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main.main(["report", str(run.folder), "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == gather(run.folder)
    assert not out.exists()


@pytest.mark.long
def test_tables_and_figures_of_the_saved_results(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["report", str(run.folder), "--out", str(tmp_path / "new" / "page.html")]
    command += ["--csv", str(tmp_path / "csv"), "--figures", str(tmp_path / "figures")]
    assert main.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    written = [Path(line.removeprefix("wrote ")) for line in said]
    assert all(path.is_file() for path in written)
    assert {path.parent for path in written} == {
        tmp_path / "new",
        tmp_path / "csv",
        tmp_path / "figures",
    }
    with (tmp_path / "csv" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class_name"] for row in rows] == list(ODD_NAMES)
    best = run.evaluation.one_class.classifiers[1].average_precision
    assert float(rows[1]["average_precision"]) == best
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".svg"}


def test_what_is_missing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"data": "x"}')
    assert main.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "missing: Results: evaluation.json is not in the run's folder. `coded-resnext" in said
    assert "x" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bad_folders_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    for folder, message in (
        (tmp_path / "none", "RUN: expected the folder of a run, found none at"),
        (tmp_path, "RUN: expected the folder of a run, got"),
    ):
        assert main.main(["report", str(folder), *options]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"coded-resnext: {message}")
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_tables_of_no_results_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main.main(["report", str(tmp_path), "--csv", str(tmp_path / "csv")]) == 2
    assert "evaluation.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_page_is_written_whatever_a_name_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyload#4523, gsutil#1625: a name that is not UTF-8 cost the report."""
    monkeypatch.setattr(report, "render", lambda content: "caf\udce9")
    path = report._write_page({}, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == "caf\\udce9"


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("semantics.blocks", "semantics.blocks: expected 3 entries, got 0"),
        ("paths.outside", "paths.outside: expected 3 entries, got 0"),
        ("early_decoding.blocks", "early_decoding.blocks: expected 3 entries, got 0"),
        ("removal.blocks.0.active.accuracy", "removal.blocks.accuracy: expected 3 entries, got 0"),
        ("one_class.classifiers", "one_class.classifiers: expected 4 entries, got 0"),
        ("samples.blocks.1.decoded", "samples.blocks.decoded: expected "),
        ("samples_per_class", "samples_per_class: expected 4 entries, got 0"),
        ("blocks", "early_decoding.blocks: expected 0 entries, got 3"),
    ],
)
def test_results_whose_parts_do_not_fit_are_one_sentence(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, sentence: str
) -> None:
    """transformers#10632's kind: each part was sound alone, and tables took them for one whole."""
    content = json.loads((run.folder / "evaluation.json").read_text())
    *keys, last = (int(key) if key.isdecimal() else key for key in part.split("."))
    place = content
    for key in keys:
        place = place[key]
    place[last] = []
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    assert main.main(["report", str(tmp_path), "--csv", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"evaluation.json: not an evaluation: {sentence}" in line
    assert main.main(["report", str(tmp_path)]) == 0
    assert sentence in capsys.readouterr().out
