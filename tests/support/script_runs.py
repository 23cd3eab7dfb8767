"""Scripts run inside the process of the tests, which has imported PyTorch already."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest


def run_here(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as its command line does; its exit status and what it printed.

    For what ends before it trains: one that asks for a thing that cannot be, or for help.
    """
    command = [str(script), *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(output),
        redirect_stderr(errors),
        patch.object(sys, "argv", command),
        patch.object(sys, "path", [str(script.parent), *sys.path]),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(script), run_name="__main__")
    status = end.value.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(command, status, output.getvalue(), errors.getvalue())
