"""Runs the tests of the kernels in Triton's interpreter, where there is no GPU to run them on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_files import KERNEL_TESTS


@pytest.mark.skipif(
    torch.cuda.is_available() or bool(os.environ.get("TRITON_INTERPRET")),
    reason="the kernels' tests run by themselves here",
)
def test_kernels_in_the_interpreter() -> None:
    folder = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(str(folder / name) for name in KERNEL_TESTS),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # Exit status 0 also stands for a run that skipped everything.
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
