"""The steps of the kernel build, each run by ninja in a process of its own.

    python -m coded_resnext.kernels.build.steps compile STEP.json ENTRIES.json
    python kernels/build/steps.py gather TOOLCHAIN.json FOLDER/sm90/index.json ENTRIES.json ...

`compile` compiles some rows of launch settings for one architecture, since a process compiles for
one device only. `STEP.json` names the rows, where they come from, and the architecture. Steps share
a Triton cache, and what that already has is not compiled again. `gather` puts what was compiled
into a folder that may be moved. It runs as a plain script, with the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

# The other stages are of use to nobody who only runs the kernel.
SHIPPED = (".cubin", ".hsaco", ".json")


def target_of(arch: str) -> GPUTarget:
    """Returns Triton's target for an architecture: `sm90` from NVIDIA, `gfx942` from AMD."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)
    return GPUTarget("hip", arch, 64)


class StubDriver:
    """A GPU driver without a GPU: lets Triton compile and look up kernels for another device.

    It answers what the JIT asks of a driver, for one architecture; a launch is written down and not
    run. The build, the static checks and tests use it, never a training process.

    Args:
        arch: as for `target_of`.
    """

    def __init__(self, arch: str) -> None:
        self.target = target_of(arch)
        self.utils = self
        self.launches: list[str] = []
        """Names of the launched kernels, in order."""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        # Larger than on any device: what fits is checked where the numbers are read.
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 1}

    def load_binary(self, *_arguments: Any) -> tuple[object, object, int, int, int]:
        """Returns module, function, registers, spills and threads of a kernel that nobody will
        run."""
        return object(), object(), 0, 0, 1024

    def unload_module(self, _module: object) -> None:
        """Does nothing, since nothing was loaded."""

    def launcher_cls(self, _source: object, metadata: Any) -> Any:
        return lambda *_arguments: self.launches.append(metadata.name)


def install_stub_driver(arch: str) -> StubDriver:
    """Makes a stub the active driver for the rest of the process.

    It stays for good, since every kernel remembers the device that it was first compiled for.
    """
    from triton.runtime.driver import driver

    stub = StubDriver(arch)
    driver.set_active(stub)
    return stub


class _KeyFoundError(Exception):
    """Carries a cache key out of the JIT, before anything is compiled."""


def _raise_key(key: str, **_special: bool) -> Any:
    """Stands in for a cache manager's class."""
    raise _KeyFoundError(key)


def row_key(row: Any) -> str:
    """Returns the name under which the JIT will look for a row's kernel; nothing is compiled."""
    import triton

    from coded_resnext.kernels.layout import compiled

    before = triton.knobs.cache.manager_class
    triton.knobs.cache.manager_class = _raise_key
    try:
        compiled(row)
    except _KeyFoundError as signal:
        return str(signal)
    finally:
        triton.knobs.cache.manager_class = before
    raise AssertionError("the JIT did not ask its cache")


def compile_rows(step_path: Path, output: Path) -> None:
    """Compiles the rows of a step, and writes what came of them beside a list of the sources."""
    from coded_resnext.kernels.build.build import load_rows

    step = json.loads(step_path.read_text(encoding="utf-8"))
    install_stub_driver(step["arch"])
    rows = dict(load_rows(step["source"], step["arch"]))
    entries = [_entry(name, rows[name], step["arch"]) for name in step["rows"]]
    output.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    files = sorted(_source_files(step["source"].partition(":")[0]))
    names = " ".join(name.replace(" ", "\\ ") for name in files)
    escaped = str(output).replace(" ", "\\ ")
    Path(f"{output}.d").write_text(f"{escaped}: {names}\n", encoding="utf-8")


def _entry(name: str, row: Any, arch: str) -> dict[str, Any]:
    import triton

    from coded_resnext.kernels.layout import compiled

    groups: list[tuple[dict[str, str], bool]] = []
    triton.knobs.compilation.listener = lambda **event: groups.append(
        (event["metadata_group"], event["cache_hit"])
    )
    try:
        kernel = compiled(row)
    except Exception:
        print(f"{name} for {arch} does not compile:", flush=True)
        raise
    # The listener is silent where an earlier row of the step had the same key.
    group = groups[0][0] if groups else kernel.metadata_group
    if groups and not groups[0][1]:
        print(f"compiled {name} for {arch}", flush=True)
    folder = os.path.dirname(next(iter(group.values())))
    return {
        "row": name,
        "arch": arch,
        "key": os.path.basename(folder),
        "folder": folder,
        "files": sorted(group),
    }


def _source_files(source_module: str) -> set[str]:
    """Returns the files of the kernels and of the rows: a change there may change a key."""
    packages = {"coded_resnext.kernels", source_module, source_module.rpartition(".")[0]} - {""}
    files = {
        getattr(module, "__file__", None)
        for name, module in sys.modules.items()
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    }
    return {str(Path(file).resolve()) for file in files if file}


def gather(toolchain: Path, index: Path, *sources: Path) -> None:
    """Puts what was compiled for an architecture into the folder of its index.

    The folder is made anew and then replaces the old one, so that kernels that no row asks for any
    more vanish, and a reader finds either the old ones or the new.
    """
    entries = [entry for path in sources for entry in json.loads(path.read_text(encoding="utf-8"))]
    fresh = index.parent.with_name(f"{index.parent.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    content = {
        "format": 1,
        "arch": entries[0]["arch"],
        "toolchain": json.loads(toolchain.read_text(encoding="utf-8"))["toolchain"],
        "kernels": {entry["key"]: _copy_kernel(entry, fresh) for entry in entries},
        "rows": {entry["row"]: entry["key"] for entry in entries},
    }
    (fresh / index.name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    old = fresh.with_suffix(".old")
    if index.parent.exists():
        index.parent.rename(old)
    fresh.rename(index.parent)
    shutil.rmtree(old, ignore_errors=True)


def _copy_kernel(entry: dict[str, Any], fresh: Path) -> dict[str, str]:
    """Copies one kernel's files; returns their SHA-256 by name."""
    target = fresh / entry["key"]
    target.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name in entry["files"]:
        if name.endswith(SHIPPED):
            data = (Path(entry["folder"]) / name).read_bytes()
            (target / name).write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def main() -> None:
    """Runs the step that the command line names."""
    step, *paths = sys.argv[1:]
    steps: dict[str, Callable[..., None]] = {"compile": compile_rows, "gather": gather}
    steps[step](*map(Path, paths))


if __name__ == "__main__":
    main()
