"""A limit on the time of an evaluation, and turns for the experiments that share it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coded_resnext.files import LARGEST_RESULTS, read_json, write_atomically

# What the experiments may take of a budget; the rest is for comparing, drawing and writing.
WORKING_SHARE = 0.85
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Seconds of `"90"`, `"90s"`, `"5m"` or `"1.5h"`.

    Raises:
        ValueError: it is none of these, or not above zero.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([smh]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"budget: expected a time such as 90s, 5m or 1h, got {text!r}")
    return seconds


class Budget:
    """Time that an evaluation may take, counted from here.

    Args:
        seconds: above 0, or None for as much as it takes.
        clock: gives seconds.

    Raises:
        ValueError: the time is not above 0.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"budget: expected seconds above 0, got {seconds}")
        self.seconds, self.clock = seconds, clock
        self._start = clock()

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.seconds is not None

    @property
    def remaining(self) -> float:
        """Seconds that the experiments still have; infinite without a limit."""
        if self.seconds is None:
            return math.inf
        return max(0.0, WORKING_SHARE * self.seconds - (self.clock() - self._start))


def take_turns(work: Mapping[str, Iterator[object]], budget: Budget) -> None:
    """Run several pieces of work step by step until all are done or the budget is spent.

    The next step is one of the work that has taken the least time so far, so that the time is
    shared equally; work that is done leaves its time to the others.
    """
    spent = dict.fromkeys(work, 0.0)
    waiting = dict(work)
    while waiting and budget.remaining > 0:
        name = min(waiting, key=spent.__getitem__)
        start = budget.clock()
        try:
            next(waiting[name])
        except StopIteration:
            del waiting[name]
        spent[name] += budget.clock() - start


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
