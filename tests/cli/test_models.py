"""Shipped weights at the command line: listed, and a name wherever a command takes a run."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from coded_resnext import list_models
from coded_resnext.cli import main
from coded_resnext.cli.models import tables
from coded_resnext.data.datasets import load_digits_split
from coded_resnext.interpret import load_evaluation
from coded_resnext.interpret.results import PICTURES_FILE, load_pictures
from coded_resnext.models.checkpoint import find_model, shipped_weights


def command(*words: object) -> int:
    return main.main([str(word) for word in words])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Six test images of the digits as PNG in the current folder, named after their digits."""
    monkeypatch.chdir(tmp_path)
    split = load_digits_split()
    paths = []
    for index in split.test_indices[:6].tolist():
        pixels = (load_digits().images[index] / 16 * 255).round().astype(np.uint8)
        paths.append(Path(f"{load_digits().target[index]}-{index}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return sorted(paths)


def test_networks_and_weights_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("models", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    printed = tables(content)
    assert [row["network"] for row in content["networks"]] == list_models()
    assert [row["weights"] for row in content["weights"]] == shipped_weights()
    for row in content["weights"]:
        assert f"{row['test_accuracy']:.2%}" in printed
        assert row["license"] in printed
    digits = next(row for row in content["networks"] if row["network"] == "coded_resnext_digits")
    assert (digits["parameters"], digits["coded_blocks"]) == (205_672, 4)


def test_predict_right_after_install(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("predict", "digits", *photos, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    right = [row["class_name"] == row["file"][0] for row in rows]
    assert sum(right) >= 5
    assert all(len(branches) in (3, 5) for row in rows for branches in row["path"])
    assert command("predict", "digits", photos[0], "--early", "--json") == 0
    [early] = json.loads(capsys.readouterr().out)
    assert early["exit_block"] is not None
    assert early["macs"] < rows[0]["macs"]
    assert command("predict", "digits", *photos) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, rows, strict=True):
        if row["shown_from"] is None:
            assert "classifier alone" in line
        else:
            assert f"classifier, shown from block {row['shown_from']}/4 on" in line


def test_photographs_right_after_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test images that the weights bring along are read as in their evaluation."""
    monkeypatch.chdir(tmp_path)
    folder = find_model("cifar10_small")
    samples = load_evaluation(folder).samples
    assert samples is not None
    pictures = load_pictures(folder / PICTURES_FILE)
    for position in samples.positions[::20]:
        content = pictures[position].partition("base64,")[2]
        Path(f"{position}.png").write_bytes(base64.b64decode(content))
    names = load_evaluation(folder).class_names
    for margin in ([], ["--margin", "0.2"]):
        assert command("predict", "cifar10_small", *Path().glob("*.png"), "--json", *margin) == 0
        rows = {int(Path(row["file"]).stem): row for row in json.loads(capsys.readouterr().out)}
        assert len(rows) == 12
        if not margin:
            for position, said in zip(samples.positions, samples.predictions, strict=True):
                if position in rows:
                    assert rows[position]["class_name"] == names[said]
    assert command("extract", "cifar10_small", "cat") == 0
    assert command("report", "cifar10_small") == 0


def test_what_is_made_of_shipped_weights_goes_to_the_current_folder(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    package = find_model("digits")
    before = sorted(package.iterdir())
    assert command("extract", "digits", "7") == 0
    assert "threshold" in capsys.readouterr().out
    assert command("export", "digits", "--format", "shared") == 0
    assert command("report", "digits") == 0
    assert "missing" not in capsys.readouterr().out
    assert command("info", "digits") == 0
    made = {str(path) for path in Path("digits").rglob("*") if path.is_file()}
    assert {"digits/report.html", "digits/export/shared/config.json"} < made
    assert any(path.startswith("digits/classifiers/") for path in made)
    assert sorted(package.iterdir()) == before
    # The name still means the same.
    assert command("predict", "digits", photos[0]) == 0
