"""A limit on the time of an evaluation, and turns for the experiments that share it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping

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
