"""Where kernels that were compiled ahead of time lie, and what lies there. No Triton, no GPU.

A *folder* of prebuilt kernels holds one subfolder for each architecture (`sm90`), and that an
`index.json` with the toolchain, and one subfolder for each kernel, named by Triton's cache key.
Nothing in it depends on where it lies: it may be moved, copied into an image, or mounted read-only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDERS_VARIABLE = "CODED_RESNEXT_KERNELS"
INDEX = "index.json"
FORMAT = 1
LARGEST_INDEX = 16 * 2**20


def toolchain() -> dict[str, str]:
    """Returns what cache keys are bound to: the exact Triton wheel."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "triton": triton,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "platform": sysconfig.get_platform(),
    }


def default_folder() -> Path | None:
    """Returns the folder in the user's cache for this toolchain; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError:
            # A container's user may have neither HOME nor an entry in passwd.
            return None
    return Path(cache, "coded-resnext", "kernels", "-".join(("triton", *toolchain().values())))


def folders() -> list[Path]:
    """Folders to look in: those of CODED_RESNEXT_KERNELS, or else the default one.

    The variable separates folders as PATH does; empty, it turns prebuilt kernels off.
    """
    value = os.environ.get(FOLDERS_VARIABLE)
    if value is None:
        folder = default_folder()
        return [] if folder is None else [folder]
    return [Path(part) for part in value.split(os.pathsep) if part]


@dataclass(frozen=True)
class Prebuilt:
    """The kernels of one architecture."""

    folder: Path
    """Of this architecture: the one that holds the index."""
    arch: str
    toolchain: dict[str, str]
    kernels: dict[str, dict[str, str]]
    """For every cache key the SHA-256 of each file, by name."""
    rows: dict[str, str]
    """The cache key of every row of launch settings, by name."""

    @property
    def is_current(self) -> bool:
        """Returns whether this process, with its Triton, can have use of them."""
        return self.toolchain == toolchain()

    def files(self, key: str) -> dict[str, str] | None:
        """Paths of a kernel's files by name; None where it is not here or not as it was written.

        A kernel that lost a byte would load and compute something else, so every file is read.
        """
        digests = self.kernels.get(key)
        if not digests or not all(map(_is_plain, (key, *digests))):
            return None
        paths = {name: self.folder / key / name for name in digests}
        try:
            intact = all(
                path.is_file() and foreign_writer(path) is None and _digest(path) == digests[name]
                for name, path in paths.items()
            )
        except OSError:
            return None
        return {name: str(path) for name, path in paths.items()} if intact else None


def read_index(path: Path) -> Prebuilt:
    """Read an `index.json`.

    Raises:
        ValueError: the file is not one, or of another format.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"expected at most {LARGEST_INDEX >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r:.80}, expected {FORMAT}")
        return Prebuilt(
            path.parent,
            content["arch"],
            dict(content["toolchain"]),
            {key: dict(files) for key, files in content["kernels"].items()},
            dict(content["rows"]),
        )
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of prebuilt kernels: {error}") from error


def find_prebuilt() -> tuple[list[Prebuilt], list[str]]:
    """Returns what lies in `folders()`, and what is wrong with the rest, in sentences."""
    indexes, faults = [], []
    for folder in folders():
        for path in sorted(folder.glob(f"*/{INDEX}")):
            try:
                writer = foreign_writer(path)
                if writer is not None:
                    raise ValueError(f"{writer}: others than this user may write to it")
                indexes.append(read_index(path))
            except (ValueError, OSError) as error:
                faults.append(str(error))
    return indexes, faults


def foreign_writer(path: Path) -> Path | None:
    """Returns what others than this user may change of a path and the folders above it, if any.

    The administrator may change everything. In a folder such as /tmp others may not rename what is
    not theirs.
    """
    if os.name != "posix":
        return None
    path = path.resolve()
    for part in (path, *path.parents):
        status = part.lstat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        # A group of one's own has one's own number.
        if status.st_gid == status.st_uid and not status.st_mode & stat.S_IWOTH:
            shared = 0
        if status.st_mode & stat.S_ISVTX and part != path:
            shared = 0
        if status.st_uid not in (0, os.geteuid()) or shared:
            return part
    return None


def _is_plain(name: str) -> bool:
    """Returns whether a name is that of a file in its folder, and no path out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
