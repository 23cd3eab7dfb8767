"""Runs of pytest in chosen environments: how many tests passed, the rows kept, and their table.

What `version_matrix.py` (other versions) and `portability.py` (other processors) share.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

VERSIONS = """
import importlib.metadata as m, json, platform
names = ("torch", "triton", "numpy", "torchvision")
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version(), **{n: found.get(n) for n in names}}))
"""

COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def run_tests(
    python: Path,
    tests: Sequence[str],
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    processes: int = 4,
) -> dict[str, Any]:
    """Run tests with an interpreter: `seconds`, `passed`, `skipped`, `failed` and `failures`.

    A run that ends before its first test counts as one failure, and what it said is printed.
    `environment` is added to this process's, with one thread unless it says otherwise.
    """
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    if processes > 1:
        command += ["-n", "auto", "--maxprocesses", str(processes), "--dist", "loadfile"]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, *tests],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": search_path(),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    counts = count_outcomes(done.stdout)
    # A run that ends before its first test has no counts.
    if done.returncode not in (0, 1) or not counts["passed"]:
        counts["failed"] = max(counts["failed"], 1)
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return {
        "seconds": round(time.monotonic() - begun),
        **counts,
        "failures": FAILURE.findall(done.stdout),
    }


def count_outcomes(output: str) -> dict[str, int]:
    """How many tests passed, were skipped, and failed (or had errors), by pytest's last line."""
    last = output.rstrip().rpartition("\n")[2]
    counts = {word: int(number) for number, word in COUNT.findall(last)}
    failed = sum(counts.get(word, 0) for word in ("failed", "error", "errors"))
    return {
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": failed,
    }


def read_versions(python: Path) -> dict[str, str | None]:
    """The versions of an environment: its Python, and of what the results depend on."""
    command = [str(python), "-c", VERSIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    versions: dict[str, str | None] = json.loads(done.stdout)
    return versions


def search_path() -> str:
    """Where the plugin `without_triton` is found; what was there before stays."""
    return os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))


def kept_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run by their names."""
    if not path.exists():
        return {}
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def keep_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows; called after every row, each being long."""
    path.write_text(json.dumps({"rows": list(rows)}, indent=1) + "\n", encoding="utf-8")


def table_row(*cells: object) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*names: str) -> str:
    """The first two rows of a Markdown table."""
    return table_row(*names) + "\n|" + "---|" * len(names)
