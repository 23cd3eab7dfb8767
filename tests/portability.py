"""The tests under imitated processors; `make portability` prints the table and keeps it.

    python tests/portability.py --out benchmarks/results/portability.json

Libraries choose their instructions by the processor, and can be told to choose older ones. Each row
tells all of them so. What this processor lacks is not run and counts as neither passed nor failed.
`--tests` takes other tests than those of arithmetic; `--rows` takes some of the rows and leaves the
others in the file as they are. Exits with 1 when a test failed, or when a setting had no effect.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite_runs import ROOT, keep_rows, kept_rows, read_versions, run_tests, table_head, table_row

from coded_resnext.training.run_folder import describe_machine

OUT = ROOT / "benchmarks" / "results" / "portability.json"
COLUMNS = ("processor", "in effect", "passed", "skipped", "failed", "minutes", "commit")
AVX2 = ("avx2", "fma")
AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Asks every library, in a process of its own, what it will use. oneDNN and MKL say it themselves.
QUESTION = """
import json
import numpy as np
import torch
torch.conv2d(torch.ones(2, 16, 8, 8), torch.ones(16, 16, 3, 3))
torch.ones(64, 64) @ torch.ones(64, 64)
np.ones((64, 64)) @ np.ones((64, 64))
try:
    from threadpoolctl import threadpool_info
    blas = {one["architecture"] for one in threadpool_info() if one["internal_api"] == "openblas"}
except ImportError:
    blas = set()
dispatched = np._core._multiarray_umath.__cpu_dispatch__
features = np._core._multiarray_umath.__cpu_features__
print(json.dumps({
    "ATen": torch.backends.cpu.get_cpu_capability(),
    "OpenBLAS": ", ".join(sorted(blas)),
    "NumPy": ", ".join(name for name in dispatched if features.get(name)) or "baseline",
    "threads": torch.get_num_threads(),
    "dispatched": dispatched,
}))
"""
SAID = {"oneDNN": re.compile(r"cpu,isa:(.+)"), "MKL": re.compile(r"CNR:(\w+)")}


@dataclass(frozen=True)
class Processor:
    """A processor that is imitated: what the libraries are told, and what they must say then."""

    kind: str
    environment: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    """By library, a regular expression."""
    needs: tuple[str, ...] = ()
    """Flags without which this processor would stop at an instruction that it does not know."""
    threads: int = 1

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.kind}, {self.threads} thread{'s' if self.threads > 1 else ''}"


# The settings of one library do not reach another, so that one run can imitate all of them.
# NumPy is asked for the names of its code paths, which differ from version to version.
OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Prescott",
    "NPY_DISABLE_CPU_FEATURES": "all",
}
SAYS_OLDEST = {
    "ATen": "DEFAULT",
    "oneDNN": ".*SSE4.1",
    "MKL": "COMPATIBLE",
    "OpenBLAS": "Prescott|Katmai",
    "NumPy": "baseline",
}


def processor(
    kind: str, aten: str, onednn: tuple[str, str], openblas: tuple[str, str], needs: tuple[str, ...]
) -> Processor:
    """One that has `needs`; oneDNN and OpenBLAS have a setting and what they say of it."""
    told = {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn[0],
        "OPENBLAS_CORETYPE": openblas[0],
    }
    says = {"ATen": aten.upper(), "oneDNN": onednn[1], "OpenBLAS": openblas[1]}
    return Processor(kind, told, says, needs)


PROCESSORS = (
    Processor("as it is"),
    Processor("as it is", threads=2),
    Processor("without AVX", OLDEST, SAYS_OLDEST),
    Processor("without AVX", OLDEST, SAYS_OLDEST, threads=2),
    processor("Intel with AVX2", "avx2", ("AVX2", ".*AVX2"), ("Haswell", "Haswell"), AVX2),
    # A build without Zen's own code takes Haswell's.
    processor("AMD with AVX2", "avx2", ("AVX2", ".*AVX2"), ("Zen", "Zen|Haswell"), AVX2),
    processor("AVX-512", "avx512", ("AVX512_CORE", ".*AVX-?512"), ("SkylakeX", "SkylakeX"), AVX512),
)

# A file that compares numbers has one of these words.
COMPARES = re.compile(
    r"relative_error|torch\.equal|assert_close|allclose|approx\(|accuracy|gradcheck"
)
# Tables of compiled kernels, pages in a browser and folders of runs hold no arithmetic of ours.
LEFT_OUT = ("benchmarks", "report", "test_static", "test_hostile", "test_signals", "test_digits")


def main() -> int:
    """Run the tests on every processor, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="JSON to write")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), metavar="FILE")
    parser.add_argument("--tests", nargs="*", help="files, folders or names of tests")
    parser.add_argument(
        "--rows", nargs="*", default=[""], help="rows with one of these in the name"
    )
    parser.add_argument("--processes", type=int, default=4, help="at most so many at once")
    arguments = parser.parse_args()
    tests = arguments.tests or arithmetic_tests()
    rows = kept_rows(arguments.out) if arguments.rows != [""] else {}
    failed = False
    print(table_head(*COLUMNS), flush=True)
    for processor in PROCESSORS:
        if not any(part in processor.name for part in arguments.rows):
            continue
        row = try_tests(processor, arguments.python, tests, arguments.processes)
        rows[processor.name] = row
        failed |= row["failed"] > 0
        print(describe(row), flush=True)
        keep_rows(arguments.out, (rows[one.name] for one in PROCESSORS if one.name in rows))
    return int(failed)


def arithmetic_tests() -> list[str]:
    """The files whose outcome depends on arithmetic: those that compare numbers."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [
        (file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files
    ]
    return [
        name
        for name, text in names
        if COMPARES.search(text) and not any(part in name for part in LEFT_OUT)
    ]


def try_tests(
    processor: Processor, python: Path, tests: Sequence[str], processes: int
) -> dict[str, Any]:
    """One row: what is in effect and how the tests went, or why they were not run."""
    machine = describe_machine()
    row: dict[str, Any] = {
        "name": processor.name,
        **{key: machine[key] for key in ("date", "commit", "cpu")},
        "platform": platform.platform(),
        "versions": read_versions(python),
        "files": len(tests),
        "failed": 0,
    }
    lacking = [flag for flag in processor.needs if flag not in processor_flags()]
    if lacking:
        return {**row, "not_run": f"not on this processor: {', '.join(lacking)}"}
    environment = environment_of(processor, python)
    row["environment"] = environment
    row["in_effect"] = said = ask(python, environment)
    if said["threads"] != processor.threads:
        return {**row, "not_run": f"not on this processor: {said['threads']} threads"}
    ignored = [
        f"{library} says {said[library] or 'nothing'}"
        for library, words in processor.expected.items()
        if not re.fullmatch(words + ".*", said[library])
    ]
    if ignored:
        return {**row, "failed": 1, "not_run": f"no effect: {'; '.join(ignored)}"}
    return {**row, **run_tests(python, tests, environment=environment, processes=processes)}


def environment_of(processor: Processor, python: Path) -> dict[str, str]:
    """The variables that a run is started with."""
    environment = {**processor.environment, "OMP_NUM_THREADS": str(processor.threads)}
    if processor.threads > 1:
        # Threads that wait would otherwise take the cores from those of the other processes.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if environment.get("NPY_DISABLE_CPU_FEATURES") == "all":
        environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(ask(python, {})["dispatched"])
    return environment


def ask(python: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """What each library says that it uses; an empty word where one is absent."""
    done = subprocess.run(
        [str(python), "-P", "-c", QUESTION],
        env={**os.environ, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, Any] = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    for library, words in SAID.items():
        match = words.search(done.stdout)
        said[library] = match[1].strip() if match else ""
    return said


def processor_flags() -> set[str]:
    """What Linux says that the processor can; nothing elsewhere, where the newest rows are left."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    flags = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return set(flags[0].split()) if flags else set()


def describe(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "not_run" in row:
        return table_row(row["name"], row["not_run"], "", "", "", "", row["commit"])
    effect = "; ".join(
        f"{library} {row['in_effect'][library]}"
        for library in ("ATen", "oneDNN", "MKL", "OpenBLAS", "NumPy")
        if row["in_effect"][library]
    )
    numbers = (row["passed"], row["skipped"], row["failed"], round(row["seconds"] / 60, 1))
    return table_row(row["name"], effect, *numbers, row["commit"])


if __name__ == "__main__":
    sys.exit(main())
