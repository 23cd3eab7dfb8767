"""Kernels that were compiled ahead of time: where they lie, and how Triton comes to load them.

A *folder* of prebuilt kernels holds one subfolder for each architecture (`sm90`), and that an
`index.json` with the toolchain, and one subfolder for each kernel, named by Triton's cache key.
Nothing in it depends on where it lies: it may be moved, copied into an image, or mounted read-only.

Triton asks a cache manager for the files of a key. The manager here answers from the folders, and
hands everything else to the manager that was there before. Whatever is wrong with a prebuilt
kernel, the answer is "not here", and Triton compiles.

Reading a folder needs neither Triton nor a GPU: `install` alone imports Triton.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

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
    caches = os.environ.get("XDG_CACHE_HOME")
    if not caches:
        try:
            caches = str(Path.home() / ".cache")
        except RuntimeError:
            # A container's user may have neither HOME nor an entry in passwd.
            return None
    return Path(caches, "coded-resnext", "kernels", "-".join(("triton", *toolchain().values())))


def folders() -> list[Path]:
    """Returns the folders to look in: those of CODED_RESNEXT_KERNELS, or else the default one.

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
    """Reads an `index.json`.

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


class PrebuiltFirst:
    """Stands in for Triton's cache manager of a key, and answers from the prebuilt kernels.

    Writes and everything else go to the manager that it replaced.
    """

    replaced: Callable[..., Any]
    sources: tuple[Prebuilt, ...] = ()

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        from triton import knobs

        self._key = key
        self._special = {"override": override, "dump": dump}
        # Overriding, dumping and compiling always are wishes for what the user has at hand.
        self._asked = not (override or dump or knobs.compilation.always_compile)
        self._manager: Any = None

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self._asked:
            for source in self.sources:
                if self._key in source.kernels:
                    files = source.files(self._key)
                    if files is not None and filename in files:
                        return files
                    logger.warning(
                        "prebuilt kernel %s in %s is damaged; compiling it", filename, source.folder
                    )
        group: dict[str, str] | None = self._next().get_group(filename)
        return group

    def _next(self) -> Any:
        """Returns the replaced manager, made on demand: a hit neither creates nor touches the
        user's own cache."""
        if self._manager is None:
            special = {name: value for name, value in self._special.items() if value}
            self._manager = self.replaced(self._key, **special)
        return self._manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._next(), name)


@cache
def install() -> int:
    """Lets Triton look among the prebuilt kernels first; returns the number that it can load.

    This happens once in a process, when a kernel is first looked up. A folder that cannot be read,
    or that another Triton filled, is named in a warning; its kernels are compiled as if it were not
    there.
    """
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    sources, faults = find_prebuilt()
    for fault in faults:
        logger.warning("prebuilt kernels left out: %s", fault)
    current = tuple(source for source in sources if source.is_current)
    for source in sources:
        if not source.is_current:
            logger.warning(
                "prebuilt kernels in %s left out: they are for %s, and this is %s",
                source.folder,
                source.toolchain,
                toolchain(),
            )
    arch = _architecture() if folders() else None
    if arch is not None and all(source.arch != arch for source in current):
        logger.warning(
            "no kernels were built for %s: each is compiled when it is first launched, one after "
            "the other. `coded-resnext build-kernels`, or coded_resnext.warm_up before the first "
            "step, compiles them on all processors",
            arch,
        )
    if current:
        PrebuiltFirst.replaced = knobs.cache.manager_class or FileCacheManager
        PrebuiltFirst.sources = current
        knobs.cache.manager_class = PrebuiltFirst
    return sum(len(source.kernels) for source in current)


def _architecture() -> str | None:
    """Returns the name of the architecture that Triton compiles for; None without a GPU."""
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return None
    try:
        target = driver.active.get_current_target()
    except RuntimeError:
        return None
    return f"sm{target.arch}" if target.backend == "cuda" else str(target.arch)
