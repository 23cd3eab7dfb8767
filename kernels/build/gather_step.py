"""Last step of the kernel build: gather what was compiled into a folder that may be moved.

Run by ninja as a plain script, with the standard library only:

    python kernels/build/gather_step.py TOOLCHAIN.json FOLDER/sm90/index.json ENTRIES.json ...

The folder is made anew beside the old one and takes its place, so that kernels that no row asks for
any more vanish, and a reader finds either the old ones or the new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# The other stages are of use to nobody who only runs the kernel.
SHIPPED = (".cubin", ".hsaco", ".json")


def main() -> None:
    toolchain, index, *sources = map(Path, sys.argv[1:])
    entries = [entry for path in sources for entry in json.loads(path.read_text(encoding="utf-8"))]
    fresh = index.parent.with_name(f"{index.parent.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    content = {
        "format": 1,
        "arch": entries[0]["arch"],
        "toolchain": json.loads(toolchain.read_text(encoding="utf-8"))["toolchain"],
        "kernels": {entry["key"]: copy_kernel(entry, fresh) for entry in entries},
        "rows": {entry["row"]: entry["key"] for entry in entries},
    }
    (fresh / index.name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    old = fresh.with_suffix(".old")
    if index.parent.exists():
        index.parent.rename(old)
    fresh.rename(index.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_kernel(entry: dict[str, Any], fresh: Path) -> dict[str, str]:
    """Copy one kernel's files; their SHA-256 by name."""
    target = fresh / entry["key"]
    target.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name in entry["files"]:
        if name.endswith(SHIPPED):
            data = (Path(entry["folder"]) / name).read_bytes()
            (target / name).write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()
    return digests


if __name__ == "__main__":
    main()
