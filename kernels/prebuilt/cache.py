"""Makes Triton look among the prebuilt kernels before it compiles one.

Triton asks a cache manager for the files of a key. The manager here answers from the prebuilt
folders, and hands everything else to the manager that was there before. Whatever is wrong with a
prebuilt kernel, the answer is "not here", and Triton compiles.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import CacheManager, FileCacheManager

from .index import Prebuilt, find_prebuilt, folders, toolchain

logger = logging.getLogger(__name__)


class PrebuiltFirst(CacheManager):  # type: ignore[misc]
    """Reads prebuilt kernels; writes and everything else go to the manager that it replaced."""

    replaced: type[CacheManager] = FileCacheManager
    sources: tuple[Prebuilt, ...] = ()

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._key = key
        self._special = {"override": override, "dump": dump}
        # Overriding, dumping and compiling always are wishes for what the user has at hand.
        self._asked = not (override or dump or knobs.compilation.always_compile)
        self._manager: CacheManager | None = None

    def _next(self) -> Any:
        """Made on demand: a hit neither creates nor touches the user's own cache."""
        if self._manager is None:
            special = {name: value for name, value in self._special.items() if value}
            self._manager = self.replaced(self._key, **special)
        return self._manager

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

    def get_file(self, filename: str) -> Any:
        return self._next().get_file(filename)

    def put(self, data: Any, filename: str, binary: bool = True) -> Any:
        return self._next().put(data, filename, binary)

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        return self._next().put_group(filename, group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._next(), name)


@cache
def install() -> int:
    """Put the manager in place, once in a process; the number of prebuilt kernels it can serve.

    Called when a kernel is first looked up. A folder that cannot be read, or that another
    Triton filled, is named in a warning; its kernels are compiled as if it were not there.
    """
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
    if knobs.runtime.interpret:
        return None
    try:
        target = driver.active.get_current_target()
    except RuntimeError:
        return None
    return f"sm{target.arch}" if target.backend == "cuda" else str(target.arch)
