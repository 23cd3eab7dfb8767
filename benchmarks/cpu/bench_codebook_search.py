"""Searching codebooks without the shipped data, one core, default effort.

Each row is a size: what the search finds and how long it takes, beside a greedy search in random
order (take a word when it is far enough from all taken ones, the way codebooks were made when the
method was published) at the same distance, and beside the codebook published with the method where
there is one.

    OMP_NUM_THREADS=1 taskset -c 0 python -m pytest benchmarks/cpu/bench_codebook_search.py \
        --benchmark-only --results benchmarks/results/cpu_codebook_search.json
    python benchmarks/render.py benchmarks/results/cpu_codebook_search.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from coded_resnext.codebooks.search import search
from coded_resnext.codebooks.words import Words, distance_histogram, is_balanced

GREEDY_WORDS = 60_000


class Case(NamedTuple):
    """A size, what the search must reach, and what was published: (distance, pairs, loads)."""

    size: tuple[int, int, int]
    distance: int
    pairs: int | None
    seconds: float
    published: str = ""


CASES = (
    Case((10, 10, 3), 4, 30, 5, "4 / 30 / 3..3"),
    Case((10, 10, 5), 4, 10, 5, "4 / 20 / 5..5"),
    Case((100, 20, 4), 4, 680, 5, "4 / 769 / 20..20"),
    Case((100, 20, 8), 8, None, 10, "8 / 2910 / 40..40"),
    Case((100, 16, 8), 6, None, 10, "4 / 106 / 50..50"),
    Case((200, 24, 6), 6, 2400, 10),
    Case((365, 32, 8), 8, None, 10),
    Case((1000, 32, 4), 4, None, 20, "4 / 33403 / 125..125"),
    Case((1000, 32, 8), 6, None, 20, "6 / 3157 / 249..251"),
    Case((1000, 32, 16), 10, 15_000, 20, "10 / 17221 / 499..501"),
    Case((21_841, 64, 16), 14, None, 30),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}x{}/{}".format(*_order(case.size)))
def test_search(case: Case, benchmark: Any, record: Callable[[dict[str, Any]], None]) -> None:
    classes, branches, active = case.size
    times: list[float] = []

    def run() -> Words:
        start = time.perf_counter()
        words = search(classes, branches, active).words
        times.append(time.perf_counter() - start)
        return words

    words = benchmark.pedantic(run, rounds=1 if classes > 5000 else 3)
    histogram = distance_histogram(words)
    distance = min(histogram)
    assert is_balanced(words)
    assert (run() == words).all(), "the search is not deterministic"
    assert distance >= case.distance
    if case.pairs is not None and distance == case.distance:
        assert histogram[distance] <= case.pairs
    assert min(times) <= case.seconds
    greedy = "" if classes > 5000 else greedy_result(classes, branches, active, distance)
    record(
        {
            "size": "{} x {}/{}".format(*_order(case.size)),
            "distance / pairs / loads": describe(words),
            "seconds": round(min(times), 2),
            "greedy": greedy,
            "published": case.published,
        }
    )


def greedy_result(classes: int, branches: int, active: int, distance: int) -> str:
    """Returns what the greedy search reaches at a distance, with its time."""
    start = time.perf_counter()
    words = greedy(classes, branches, active, distance)
    seconds = time.perf_counter() - start
    if len(words) < classes:
        return f"only {len(words)} words, {seconds:.2f} s"
    return f"{describe(words)}, {seconds:.2f} s"


def greedy(classes: int, branches: int, active: int, distance: int) -> Words:
    """Returns random words one after the other, each kept when it is far enough from those kept."""
    rng = np.random.default_rng(0)
    kept = np.zeros((0, branches), dtype=np.uint8)
    for _ in range(GREEDY_WORDS):
        word = np.zeros(branches, dtype=np.uint8)
        # Emptier columns are likelier, so that the loads stay near each other.
        ranks = kept.sum(axis=0) + rng.random(branches) * max(2.0, 0.2 * len(kept))
        word[np.argsort(ranks)[:active]] = 1
        if not len(kept) or 2 * (active - int((kept @ word).max())) >= distance:
            kept = np.concatenate([kept, word[None]])
            if len(kept) == classes:
                break
    return kept


def describe(words: Words) -> str:
    """Returns `distance / pairs at it / least..most classes per branch`."""
    histogram = distance_histogram(words)
    loads = words.sum(axis=0, dtype=int)
    return f"{min(histogram)} / {histogram[min(histogram)]} / {loads.min()}..{loads.max()}"


def _order(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns classes, active, branches: the order in which sizes are written."""
    return size[0], size[2], size[1]
