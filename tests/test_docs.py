"""Pages whose blocks run as they stand, and notebooks, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = ("README.md", "docs/questions.md")
# Smaller than the notebooks' own settings.
NOTEBOOKS = {
    "early_exit_and_one_class": "IMAGES = 100",
    "train_and_look": "EPOCHS = 2",
    "your_own_classifier": "EPOCHS, IMAGES = 2, 12",
}


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    start = time.perf_counter()
    # Blocks of Python go on from one another, those of a shell are commands of their own.
    python = ""
    for kind, code in blocks:
        if kind == "python":
            python += code
            continue
        command = ["bash", "-ec", code]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
    result = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{python}\n{result.stdout}\n{result.stderr}"
    print(f"{page}: {len(blocks)} blocks, {time.perf_counter() - start:.0f} s")


def test_notebooks_hold_no_outputs_and_every_one_is_run() -> None:
    paths = sorted((ROOT / "examples").glob("*.ipynb"))
    assert [path.stem for path in paths] == sorted(NOTEBOOKS)
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([folder, os.environ["PATH"]]))
    # The kernels of Triton are not interpreted where a person runs it.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", 4)
    settings = [cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells].index(True)
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(NOTEBOOKS[name]))
    # An error in a cell is raised here.
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(output.get("data", {}).get("image/png") for output in outputs)
