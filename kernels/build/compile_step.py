"""One step of the kernel build: compile some rows of launch settings for one architecture.

Run by ninja in a process of its own, since a process compiles for one device only:

    python -m coded_resnext.kernels.build.compile_step STEP.json ENTRIES.json

`STEP.json` names the rows, where they come from, and the architecture. Steps share a Triton cache,
and what that already has is not compiled again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import triton

from coded_resnext.kernels.layout import compiled

from .build import load_rows
from .stub_driver import install_stub_driver


class _KeyFoundError(Exception):
    """Carries a cache key out of the JIT, before anything is compiled."""


def _raise_key(key: str, **_special: bool) -> Any:
    """Stands in for a cache manager's class."""
    raise _KeyFoundError(key)


def row_key(row: Any) -> str:
    """Returns the name under which the JIT will look for a row's kernel; nothing is compiled."""
    before = triton.knobs.cache.manager_class
    triton.knobs.cache.manager_class = _raise_key
    try:
        compiled(row)
    except _KeyFoundError as signal:
        return str(signal)
    finally:
        triton.knobs.cache.manager_class = before
    raise AssertionError("the JIT did not ask its cache")


def main() -> None:
    step = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    install_stub_driver(step["arch"])
    rows = dict(load_rows(step["source"], step["arch"]))
    entries = [_entry(name, rows[name], step["arch"]) for name in step["rows"]]
    output = Path(sys.argv[2])
    output.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    files = sorted(_source_files(step["source"].partition(":")[0]))
    names = " ".join(name.replace(" ", "\\ ") for name in files)
    escaped = str(output).replace(" ", "\\ ")
    Path(f"{output}.d").write_text(f"{escaped}: {names}\n", encoding="utf-8")


def _entry(name: str, row: Any, arch: str) -> dict[str, Any]:
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
    """Files of the kernels' package and of the rows: a change there may change a key."""
    packages = {__package__ or "", source_module, source_module.rpartition(".")[0]} - {""}
    files = {
        getattr(module, "__file__", None)
        for name, module in sys.modules.items()
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    }
    return {str(Path(file).resolve()) for file in files if file}


if __name__ == "__main__":
    main()
