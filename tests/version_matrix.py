"""The tests on every supported torch with the Triton that it asks for; `make matrix` keeps them.

    python tests/version_matrix.py --out benchmarks/results/version_matrix.json

Every pair gets an environment of its own with the package and its dependencies (5 GB), which is
removed again unless `--keep` is given. `--environment 2.11=FOLDER` names one that is there, and
`--only 2.11` takes some of the pairs and leaves the rows of the others in the file as they are.
What depends on the versions is tested: kernels in Triton's interpreter, what they compile to,
operators, networks, export; `--tests tests` takes the whole suite. Exits with 1 when a test failed.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from suite_runs import ROOT, keep_rows, kept_rows, read_versions, run_tests, table_head, table_row

from coded_resnext.training.run_folder import describe_machine

SHOWN = ("python", "torch", "triton", "numpy", "torchvision")
COLUMNS = ("environment", "versions", "passed", "skipped", "failed", "tests alone", "commit")
# What stands on torch or on Triton by itself: kernels, operators, compiled networks, exported ones.
TESTS = (
    "tests/kernels",
    "tests/benchmarks",
    "tests/cli/test_export.py",
    "tests/data/test_on_device.py",
    "tests/deploy/test_export.py",
    "tests/deploy/test_extract.py",
    "tests/deploy/test_extract_files.py",
    "tests/models/fused/test_block.py",
    "tests/models/fused/test_processes.py",
    "tests/models/fused/test_inference.py",
    "tests/models/fused/test_launches.py",
    "tests/models/fused/test_network.py",
    "tests/models/fused/test_norm.py",
    "tests/models/fused/test_recompute.py",
    "tests/test_golden.py",
    "tests/models/test_grouped_conv.py",
    "tests/models/test_block.py",
    "tests/models/test_loss.py",
    "tests/models/test_resnext.py",
    "tests/test_package.py",
    "tests/deploy/test_hub.py",
    "tests/training/test_step.py",
    "tests/models/test_timm_models.py",
    "tests/kernels/build/test_training_launches.py",
    "tests/kernels/coded/test_unnormalized.py",
    "tests/test_version_matrix.py",
    "tests/kernels/build/test_warm_up.py",
)
# The kernels need Triton; so do the benchmarks' and what compiles them.
WITHOUT_TRITON = (
    "-p",
    "without_triton",
    "--ignore=tests/kernels",
    "--ignore=tests/benchmarks",
)


@dataclass(frozen=True)
class Environment:
    """Versions that are asked for, and how the tests are run there."""

    name: str
    folder: str
    """Where it is made; environments of the same versions share theirs."""
    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    """Of pytest."""
    tests: tuple[str, ...] = TESTS
    """What is run unless `--tests` says otherwise."""


NEWEST = ("torch==2.15.*", "triton==3.9.*", "torchvision==0.29.*")
ENVIRONMENTS = (
    Environment(
        "2.11",
        "2.11",
        ("torch==2.11.*", "triton==3.6.*", "torchvision==0.26.*", "numpy==2.0.*"),
    ),
    Environment("2.12", "2.12", ("torch==2.12.*", "triton==3.7.*", "torchvision==0.27.*")),
    Environment("2.13", "2.13", ("torch==2.13.*", "triton==3.7.*", "torchvision==0.28.*")),
    Environment("2.14", "2.14", ("torch==2.14.*", "triton==3.8.*", "torchvision==0.29.*")),
    Environment("2.15", "2.15", NEWEST),
    Environment("2.15, Triton absent", "2.15", NEWEST, WITHOUT_TRITON, ("tests",)),
)


def main() -> int:
    """Install, test and write, environment by environment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="folders, such as 2.11 2.14")
    parser.add_argument("--tests", nargs="+", help="files or folders of tests")
    parser.add_argument("--processes", type=int, default=4, help="at most, at a time")
    parser.add_argument("--keep", action="store_true", help="leave the environments made here")
    arguments = parser.parse_args()
    folders = {environment.folder for environment in ENVIRONMENTS}
    given = {n: Path(f) for n, _, f in (e.partition("=") for e in arguments.environment)}
    unknown = sorted({*given, *(arguments.only or ())} - folders)
    if unknown:
        parser.error(f"environments: expected some of {sorted(folders)}, got {unknown}")
    chosen = [e for e in ENVIRONMENTS if e.folder in (arguments.only or folders)]
    for environment in chosen:
        if environment.folder in given:
            versions = read_versions(given[environment.folder] / "bin" / "python")
            wrong = list(mismatches(environment.requirements, versions))
            if wrong:
                parser.error(f"--environment {environment.folder}: {'; '.join(wrong)}")

    rows = kept_rows(arguments.out) if arguments.only else {}
    # Each row takes long and is kept at once; a test holds the docs to the file of a whole run.
    partial = arguments.out.with_name(f"{arguments.out.name}.partial")
    print(table_head(*COLUMNS))
    for environment, is_last in zip(chosen, last_uses(chosen), strict=True):
        folder = given.get(environment.folder, arguments.folder / environment.folder)
        is_made = environment.folder not in given and not folder.exists()
        rows[environment.name] = try_environment(
            environment,
            folder,
            arguments.tests or environment.tests,
            processes=arguments.processes,
            installs=environment.folder not in given,
        )
        if is_last and is_made and not arguments.keep:
            shutil.rmtree(folder)
        print(describe(rows[environment.name]), flush=True)
        keep_rows(partial, [rows[e.name] for e in ENVIRONMENTS if e.name in rows])
    partial.replace(arguments.out)
    return int(any(rows[environment.name]["failed"] for environment in chosen))


def mismatches(requirements: Sequence[str], versions: Mapping[str, str | None]) -> Iterator[str]:
    """What an environment has in the place of what is asked for, as `torch==2.11.*`."""
    for requirement in requirements:
        name, _, wanted = requirement.partition("==")
        if not fnmatch(versions[name] or "none", wanted):
            yield f"{name}: expected {wanted}, got {versions[name]}"


def last_uses(environments: Sequence[Environment]) -> list[bool]:
    """For each environment, whether none behind it has its folder."""
    folders = [environment.folder for environment in environments]
    return [folder not in folders[index + 1 :] for index, folder in enumerate(folders)]


def try_environment(
    environment: Environment,
    folder: Path,
    tests: Sequence[str],
    *,
    processes: int,
    installs: bool,
) -> dict[str, Any]:
    """Make an environment where it is not given, and run the tests: the row of the table.

    An environment that cannot be made counts as one failure, so that the others are tried.
    """
    machine = describe_machine()
    described = {
        "name": environment.name,
        "requirements": environment.requirements,
        "options": environment.options,
        "tests": list(tests),
        "date": machine["date"],
        "commit": machine["commit"],
        "cpu": machine["cpu"],
        "platform": platform.platform(),
    }
    python = folder / "bin" / "python"
    try:
        if installs:
            install(environment.requirements, folder)
    except subprocess.CalledProcessError as error:
        failure = f"could not be installed: exit status {error.returncode}"
        nothing = {"versions": {}, "seconds": 0, "passed": 0, "skipped": 0}
        return {**described, **nothing, "failed": 1, "failures": [failure]}
    outcome = run_tests(python, tests, options=environment.options, processes=processes)
    return {**described, "versions": read_versions(python), **outcome}


def install(requirements: Sequence[str], folder: Path) -> None:
    """Make an environment; one that is there, or half made, gets what it lacks."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    # Editable, since processes that tests start in the checkout find the checkout first.
    subprocess.run([*pip, *requirements, "-e", f"{ROOT}[test]"], check=True)


def describe(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    versions = ", ".join(f"{name} {row['versions'].get(name)}" for name in SHOWN)
    numbers = (row[name] for name in ("passed", "skipped", "failed"))
    minutes = f"{row['seconds'] / 60:.0f} min"
    return table_row(row["name"], versions, *numbers, minutes, row["commit"])


if __name__ == "__main__":
    sys.exit(main())
