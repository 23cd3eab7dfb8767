"""Compiled kernels run here, without a GPU: `make ptx` runs all of it, this a quarter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coded_resnext.kernels.build.build import shipped_rows

HERE = Path(__file__).parent


def run(arch: str, *arguments: str) -> None:
    """Runs tests in a process whose kernels are compiled; they pass."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent)
    command = ["-m", "pytest", "-p", "ptx.plugin", "--arch", arch, "-q", "--tb=short"]
    result = subprocess.run(
        [sys.executable, *command, "-p", "no:cacheprovider", *arguments],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_the_page_has_every_kernel() -> None:
    page = (HERE.parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    kernels = {row.kernel.rpartition(":")[2] for _, row in shipped_rows("sm90")}
    assert {kernel for kernel in kernels if f"`{kernel}`" not in page} == set()


@pytest.mark.long
def test_planted_faults_are_seen() -> None:
    run("sm80", str(HERE / "compiled_executor.py"), "-k", "seen")


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("compiled_*.py")))
def test_a_quarter_of_the_compiled_tests_passes(name: str, arch: str) -> None:
    run(arch, str(HERE / name), "--quarter")
