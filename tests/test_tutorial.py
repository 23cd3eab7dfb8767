"""The tutorial, as it stands in docs/tutorial.md, on a small folder of uneven classes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.image_data import write_images

from coded_resnext.models.checkpoint import load_model

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COUNTS = {"circle": 96, "cross": 48, "square": 64, "star": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tutorial has been run, and what it printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "train").symlink_to(ROOT / "train")
    write_images(folder / "shapes" / "train", COUNTS, size=32)
    write_images(folder / "shapes" / "test", dict.fromkeys(COUNTS, 6), size=32, seed=1)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert [kind for kind, _ in blocks] == ["sh", "sh", "sh", "sh", "python"]
    printed = []
    for kind, code in blocks:
        command = ["bash", "-ec", code] if kind == "sh" else [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
        printed.append(result.stdout + result.stderr)
    (folder / "printed.json").write_text(json.dumps(printed))
    return folder


def test_the_network_learns_the_folder(folder: Path) -> None:
    loaded = load_model(folder / "runs" / "shapes")
    assert loaded.model.class_names == tuple(sorted(COUNTS))
    assert {book.classes for book in loaded.model.codebooks} == {4}
    summary = json.loads((folder / "runs" / "shapes" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.9
    assert min(summary["early_decoding"]) > 0.5
    assert summary["damaged_images"] == {}


def test_what_is_printed_tells_the_user_what_was_found(folder: Path) -> None:
    codebook, training, evaluation, *_ = json.loads((folder / "printed.json").read_text())
    assert "10" in codebook
    assert "4 classes: 232 images (24 to 96 of each) to train on" in training
    assert "learning rate 0.025 = 0.1 for batches of 128, scaled (linear) to 32" in training
    assert "24 images" in evaluation
    assert (folder / "runs" / "shapes" / "again" / "evaluation.json").exists()


def test_the_small_classifier_is_the_whole_network_s(folder: Path) -> None:
    lines = json.loads((folder / "printed.json").read_text())[-1].strip().splitlines()
    assert float(lines[-1].removeprefix("largest difference ")) < 1e-4
    said = {tuple(Path(line.split()[0]).parts[2:]): line.endswith(" square") for line in lines[:-1]}
    assert len(said) == 24
    right = sum(yes == (parts[0] == "square") for parts, yes in said.items())
    assert right >= 22
