"""Pages whose blocks run as they stand, in their order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = ("README.md", "docs/questions.md")


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
