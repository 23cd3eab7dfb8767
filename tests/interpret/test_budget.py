"""Times as text, what is left of a budget, and fair turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coded_resnext.interpret import Budget, parse_duration
from coded_resnext.interpret.budget import WORKING_SHARE, take_turns


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (" 2 m ", 120), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5 days", "-3s", "0", "1e3", "5mm"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="budget: expected a time such as 90s, 5m or 1h, got"):
        parse_duration(text)


def test_what_remains() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    assert budget.is_limited
    assert budget.remaining == WORKING_SHARE * 100
    clock.now += 30
    assert budget.remaining == pytest.approx(WORKING_SHARE * 100 - 30)
    clock.now += 100
    assert budget.remaining == 0
    assert not Budget().is_limited
    assert Budget().remaining == float("inf")
    with pytest.raises(ValueError, match="budget: expected seconds above 0, got 0"):
        Budget(0)


def test_turns_share_the_time() -> None:
    clock = Clock()
    done: list[str] = []

    def work(name: str, cost: float, steps: int) -> Iterator[None]:
        for _ in range(steps):
            clock.now += cost
            done.append(name)
            yield

    budget = Budget(100 / WORKING_SHARE, clock)
    take_turns({"slow": work("slow", 10, 50), "fast": work("fast", 1, 500)}, budget)
    # Equal time, and no step is begun after the end.
    assert done.count("slow") == 5
    assert done.count("fast") in (50, 51)
    assert budget.remaining == 0

    done.clear()
    budget = Budget(100 / WORKING_SHARE, clock)
    take_turns({"slow": work("slow", 10, 2), "fast": work("fast", 1, 500)}, budget)
    assert (done.count("slow"), done.count("fast")) == (2, 80)

    done.clear()
    take_turns({"a": work("a", 1, 3), "b": work("b", 1, 4)}, Budget())
    assert (done.count("a"), done.count("b")) == (3, 4)
