"""The tests on the oldest supported and the newest versions; `make matrix` prints and keeps them.

    python tests/version_matrix.py --out benchmarks/results/version_matrix.json

Every environment is made in a folder of its own (5 GB each) with the package and its dependencies,
unless `--environment oldest=FOLDER` names one that is there. `--tests` takes some of the tests.
Exits with 1 when a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "triton", "numpy", "torchvision")
# The kernels need Triton; so do the benchmarks' and what compiles them.
WITHOUT_TRITON = ("--ignore=tests/kernels", "--ignore=tests/benchmarks")
VERSIONS = """
import importlib.metadata as m, json, platform
names = ("torch", "triton", "numpy", "torchvision")
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version(), **{n: found.get(n) for n in names}}))
"""


@dataclass(frozen=True)
class Environment:
    """Versions that are asked for, and how the tests are run."""

    name: str
    folder: str
    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()


ENVIRONMENTS = (
    Environment("oldest", "oldest", ("torch==2.11.*", "torchvision==0.26.*", "numpy==2.0.*")),
    Environment("newest, Triton absent", "newest", (), ("-p", "without_triton", *WITHOUT_TRITON)),
    Environment("newest", "newest", ()),
)


def main() -> int:
    """Install, test, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="files or folders of tests")
    arguments = parser.parse_args()
    given = dict(entry.split("=", 1) for entry in arguments.environment)
    rows = []
    for environment in ENVIRONMENTS:
        python = Path(given.get(environment.folder, "")) / "bin" / "python"
        if environment.folder not in given:
            python = install(environment, arguments.folder / environment.folder)
        rows.append(test(environment, python, arguments.tests))
        print(describe(rows[-1]), flush=True)
        content = {
            "date": str(date.today()),
            "platform": platform.platform(),
            "tests": arguments.tests,
            "rows": rows,
        }
        # After every row, since each takes long.
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(row["failed"] for row in rows))


def install(environment: Environment, folder: Path) -> Path:
    """Make an environment, unless it is there; its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # Editable, since processes that tests start in the checkout find the checkout first.
        subprocess.run([*pip, *environment.requirements, "-e", f"{ROOT}[test]"], check=True)
    return python


def test(environment: Environment, python: Path, tests: list[str]) -> dict[str, Any]:
    """Run the tests in an environment: versions, and how many passed, were skipped, and failed."""
    versions = subprocess.run(
        [str(python), "-c", VERSIONS], capture_output=True, text=True, check=True
    )
    # Without -P the checkout, which lacks coded_resnext.kernels, would be in front of the package.
    command = [
        str(python),
        "-P",
        "-m",
        "pytest",
        "-q",
        "--all",
        "-p",
        "no:cacheprovider",
        *("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"),
        *environment.options,
    ]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, *tests],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {word: int(number) for number, word in COUNT.findall(done.stdout[-300:])}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    # A run that ends before its first test has no counts.
    if done.returncode not in (0, 1) or not counts.get("passed"):
        failed = max(failed, 1)
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return {
        **asdict(environment),
        "versions": json.loads(versions.stdout),
        "seconds": round(time.monotonic() - begun),
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": failed,
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE),
    }


COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def search_path() -> str:
    """Where the plugin is found; what was there before stays."""
    return os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))


def describe(row: dict[str, Any]) -> str:
    """A row of the table."""
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in ("python", *SHOWN))
    numbers = " | ".join(str(row[name]) for name in ("passed", "skipped", "failed"))
    return f"| {row['name']} | {versions} | {numbers} |"


if __name__ == "__main__":
    sys.exit(main())
