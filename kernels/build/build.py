"""Compiles all shipped kernels ahead of time, in parallel and incrementally, with ninja.

`shipped_rows` says which these are. A build folder holds ninja's file, one step file for about a
dozen rows, and the Triton cache that all steps (steps.py) fill. A step runs again when its rows, a
source file of the kernels or the toolchain changed; what the cache already has it does not compile.
Nothing here needs a GPU.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coded_resnext.kernels.batch_norm import rows as batch_norm_rows
from coded_resnext.kernels.coded.rows import (
    aggregate_backward,
    aggregate_forward,
    energy_backward,
    energy_forward,
    weighted_gram,
)
from coded_resnext.kernels.conv3x3 import rows as conv3x3_rows
from coded_resnext.kernels.loss.rows import LossSizes, coding_loss
from coded_resnext.kernels.prebuilt import FOLDERS_VARIABLE, INDEX, read_index, toolchain
from coded_resnext.kernels.recompute import rows as recompute_rows
from coded_resnext.kernels.residual import rows as residual_rows
from coded_resnext.kernels.rows import CodedSizes, Dtype, LaunchRow, Variant

SHIPPED_ROWS = "coded_resnext.kernels.build.build:shipped_rows"
ROWS_OF_A_STEP = 12
# Variables that change what Triton compiles or where it puts it. A process that sets one at run
# time compiles for itself, since they are a part of the cache key.
COMPILER_VARIABLES = (
    "ALLOW_",
    "AMDGCN_",
    "CODED_RESNEXT_",
    "DISABLE_",
    "LLVM_",
    "MLIR_",
    "NVPTX_",
    "PTXAS_",
    "TRITON_",
    "USE_IR_LOC",
)

# Outputs of the expand convolution's input in the paper's networks, coded stages only: the map
# sizes are those of 32-pixel CIFAR images and of ImageNet at 160 and 224 pixels.
PAPER_SIZES = {
    "20x6d c3": CodedSizes(20, 12, 512, 256),
    "20x6d c4": CodedSizes(20, 24, 1024, 64),
    "10x11d c3": CodedSizes(10, 22, 512, 256),
    "10x11d c4": CodedSizes(10, 44, 1024, 64),
    "32x4d c4 160px": CodedSizes(32, 16, 1024, 100),
    "32x4d c5 160px": CodedSizes(32, 32, 2048, 25),
    "32x4d c4 224px": CodedSizes(32, 16, 1024, 196),
    "32x4d c5 224px": CodedSizes(32, 32, 2048, 49),
}

ROW_MAKERS: tuple[Callable[[CodedSizes, Variant], LaunchRow], ...] = (
    energy_forward,
    energy_backward,
    weighted_gram,
    aggregate_forward,
    aggregate_backward,
)


class BuildError(RuntimeError):
    """The build tool is missing, or a step failed and has said why."""


def build(
    archs: Sequence[str],
    folder: Path,
    *,
    source: str = SHIPPED_ROWS,
    wanted: Callable[[str, str], bool] = lambda _name, _arch: True,
    jobs: int | None = None,
    gather: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Compiles rows for architectures.

    Args:
        archs: such as `"sm90"`.
        folder: gets a subfolder for each architecture, and `build`, for the next build only.
        source: `module:function` that yields names and rows for an architecture.
        wanted: of a row's name and an architecture, whether to compile it.
        jobs: processes at a time; by default one for each processor.
        gather: copy the kernels into the subfolders; without it they stay in `build`.

    Returns:
        For each architecture, what was compiled: row, key, folder and files.

    Raises:
        BuildError: there is no ninja, or a kernel does not compile.
    """
    work = folder.resolve() / "build"
    work.mkdir(parents=True, exist_ok=True)
    steps = {
        arch: _write_steps(
            arch,
            {name: row for name, row in load_rows(source, arch) if wanted(name, arch)},
            source,
            work,
        )
        for arch in archs
    }
    _write_if_changed(work / "toolchain.json", json.dumps(_toolchain_files(), indent=1))
    targets = folder.resolve() if gather else None
    _write_if_changed(work / "build.ninja", "\n".join(_ninja_lines(steps, work, targets)))
    command = [find_ninja(), "-C", str(work), "-j", str(jobs or processors())]
    # The command is made here; nothing in it comes from outside.
    finished = subprocess.run(command, env=clean_environment(), check=False)  # noqa: S603
    if finished.returncode != 0:
        raise BuildError("kernels were not built; what failed stands above")
    return {
        arch: [
            entry
            for step in of_arch
            for entry in json.loads(_entries_path(step).read_text(encoding="utf-8"))
        ]
        for arch, of_arch in steps.items()
    }


def missing(archs: Sequence[str], folder: Path, source: str = SHIPPED_ROWS) -> list[str]:
    """Lists in sentences what a folder lacks; keys are computed anew and nothing is compiled.

    Raises:
        BuildError: the keys cannot be computed.
    """
    lacking = []
    for arch in archs:
        index = folder / arch / INDEX
        try:
            built = read_index(index)
        except (ValueError, OSError) as error:
            lacking.append(f"{arch}: {error}")
            continue
        if not built.is_current:
            lacking.append(f"{arch}: built by {built.toolchain}, this is {toolchain()}")
            continue
        for name, key in _current_keys(arch, source).items():
            if key not in built.kernels:
                lacking.append(f"{arch}: {name}: not built")
            elif built.files(key) is None:
                lacking.append(f"{arch}: {name}: damaged")
    return lacking


def shipped_rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Yields every row that training the paper's networks launches, each with a name of its own.

    Training draws a DropSubNNs mask and removes no branches; the affine map of BatchNorm is applied
    by PyTorch. Fused blocks have rows in bfloat16, for training and for evaluation.
    """
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
    for stage, sizes in PAPER_SIZES.items():
        for dtype in dtypes:
            for make in ROW_MAKERS:
                row = make(sizes, Variant(dtype, drop=True, arch=arch))
                yield f"{row.kernel.split(':')[1]} {stage} {dtype}", row
    for branches, classes in ((10, 10), (20, 100), (32, 1000)):
        for soft in (False, True):
            sizes_of_loss = LossSizes(branches, classes, soft)
            yield f"coding_loss {branches} of {classes} soft={soft}", coding_loss(sizes_of_loss)
    yield from conv3x3_rows.shipped_rows(arch)
    yield from recompute_rows.shipped_rows(arch)
    yield from residual_rows.shipped_rows()
    yield from batch_norm_rows.shipped_rows()


def load_rows(source: str, arch: str) -> Iterable[tuple[str, Any]]:
    """Returns the names and rows that `module:function` yields for an architecture."""
    module, _, function = source.partition(":")
    rows: Iterable[tuple[str, Any]] = getattr(import_module(module), function)(arch)
    return rows


def find_ninja() -> str:
    """Returns the ninja of the Python package, or one on the path.

    Raises:
        BuildError: there is neither.
    """
    spec = find_spec("ninja")
    if spec is not None and spec.origin is not None:
        import ninja

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.is_file():
            return str(program)
    path = shutil.which("ninja")
    if path is None:
        raise BuildError("ninja: expected the build tool, found none; pip install ninja")
    return path


def processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clean_environment() -> dict[str, str]:
    """Returns the environment without what would leak into the kernels or their keys."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(COMPILER_VARIABLES)},
        # A kernel must come from the compiler, not from an earlier build.
        FOLDERS_VARIABLE: "",
        "OMP_NUM_THREADS": "1",
    }


def _current_keys(arch: str, source: str) -> dict[str, str]:
    """Returns the key of every row, from a process that compiles nothing."""
    code = (
        "import json, sys\n"
        "from coded_resnext.kernels.build import steps\n"
        "from coded_resnext.kernels.build.build import load_rows\n"
        "steps.install_stub_driver(sys.argv[1])\n"
        "rows = load_rows(sys.argv[2], sys.argv[1])\n"
        "print(json.dumps({name: steps.row_key(row) for name, row in rows}))"
    )
    result = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-c", code, arch, source],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise BuildError("cache keys could not be computed; what failed stands above")
    keys: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return keys


def _write_steps(arch: str, rows: dict[str, Any], source: str, work: Path) -> list[Path]:
    """Writes a file for every few rows, only where it differs; returns their paths."""
    paths = []
    for name, part in _divide(rows).items():
        content = {
            "arch": arch,
            "source": source,
            "rows": part,
            # Not read, but a step whose settings changed has a changed file.
            "settings": [repr(rows[row]) for row in part],
        }
        paths.append(work / arch / f"{name}.step.json")
        _write_if_changed(paths[-1], json.dumps(content, indent=1))
    return paths


def _divide(rows: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the names of each step's rows, by the kernel that a step begins with.

    Kernels of few rows share a step: its process takes longer to start than to compile one.
    """
    steps: dict[str, list[str]] = {}
    part: list[str] = []
    for kernel in dict.fromkeys(row.kernel for row in rows.values()):
        names = [name for name, row in rows.items() if row.kernel == kernel]
        for first in range(0, len(names), ROWS_OF_A_STEP):
            more = names[first : first + ROWS_OF_A_STEP]
            if not steps or len(part) + len(more) > ROWS_OF_A_STEP:
                part = steps[f"{kernel.rpartition(':')[2]}-{first}"] = []
            part += more
    return steps


def _entries_path(step: Path) -> Path:
    return step.with_name(step.name.replace(".step.", ".entries."))


def _ninja_lines(steps: dict[str, list[Path]], work: Path, targets: Path | None) -> Iterable[str]:
    environment = f"TRITON_CACHE_DIR={_quote(work / 'cache')}"
    python = _quote(sys.executable)
    script = _quote(Path(__file__).resolve().with_name("steps.py"))
    tools = _escape(work / "toolchain.json")
    yield "rule compile"
    yield f"  command = {environment} {python} -P -m {__package__}.steps compile $in $out"
    yield "  depfile = $out.d\n  deps = gcc\n  description = compile $step"
    yield "rule gather"
    yield f"  command = {python} -P {script} gather toolchain.json $out $in"
    yield "  description = gather $out"
    for arch, of_arch in steps.items():
        for step in of_arch:
            yield f"build {_escape(_entries_path(step))}: compile {_escape(step)} | {tools}"
            yield f"  step = {step.name.partition('.')[0]} for {arch}"
        if targets is not None and of_arch:
            entries = " ".join(_escape(_entries_path(step)) for step in of_arch)
            yield f"build {_escape(targets / arch / INDEX)}: gather {entries} | {tools}"
    yield ""


def _quote(path: Path | str) -> str:
    """Returns a path as the shell wants it, inside a command of ninja's."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escape(path: Path) -> str:
    """Returns a path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _toolchain_files() -> dict[str, Any]:
    """Returns the toolchain, and marks that change when a compiler of one version is rebuilt."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise BuildError("triton: expected the compiler, found none; pip install triton")
    libraries = sorted(Path(spec.origin).parent.glob("_C/libtriton*"))
    marks = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in libraries]
    return {"toolchain": toolchain(), "python": sys.version, "libraries": marks}


def _write_if_changed(path: Path, text: str) -> None:
    """Writes a file, keeping its time where nothing changed: ninja goes by times."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
