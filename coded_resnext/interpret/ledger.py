"""Finished pieces of work in a file, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..atomic_file import write_atomically
from ..text_files import LARGEST_RESULTS, read_json

FORMAT_VERSION = 1
SECONDS_BETWEEN_WRITES = 10.0


class Ledger:
    """Results of steps by key; kept in memory alone when there is no path.

    Args:
        path: the file; one that is there is read.
        fingerprint: JSON-ready; what the results depend on, the network above all.

    Raises:
        ValueError: the file is damaged, or its results depend on something else.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | None = None, fingerprint: dict[str, Any] | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "fingerprint": json.loads(json.dumps(fingerprint or {})),
            "steps": {},
        }
        self._written = time.monotonic()
        self._changed = False
        if path is not None and path.exists():
            self._read(path)

    def get(self, key: str) -> Any:
        """The result of a step, None if it was not finished."""
        return self.content["steps"].get(key)

    def put(self, key: str, result: Any) -> None:
        """Note a finished step, JSON-ready; written at once or soon."""
        self.content["steps"][key] = result
        self._changed = True
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write what was not written yet."""
        if self.path is not None and self._changed:
            write_atomically(self.path, json.dumps(self.content).encode())
            self._written, self._changed = time.monotonic(), False

    def remove(self) -> None:
        """Delete the file: everything is done."""
        self._changed = False
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            stored = read_json(path, LARGEST_RESULTS)
            good = stored["format_version"] == FORMAT_VERSION and isinstance(stored["steps"], dict)
            found = stored["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the progress of an evaluation: {error}") from error
        wanted = self.content["fingerprint"]
        if not good or not isinstance(found, dict):
            raise ValueError(f"{path}: not the progress of an evaluation of this version")
        differing = sorted(
            key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)
        )
        if differing:
            raise ValueError(
                f"{path}: holds the progress of another evaluation ({', '.join(differing)} "
                "differ); delete it or choose another folder"
            )
        self.content = stored
