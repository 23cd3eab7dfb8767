"""Random calls of every operator for as long as there is time, each round from a seed of its own.

Without `make torture`: `python tests/torture/fuzz.py SECONDS [SEED] [BACKEND]`.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from support.operator_fuzz import check
from support.strategies import DTYPES, INTERPRETED, LONG, OPERATORS, Call, calls

ROUND = 25
"""Calls of one operator from one seed."""


@dataclass
class Fuzzed:
    """What became of the calls."""

    tried: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OPERATORS, 0))
    wrong: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        each = ", ".join(f"{name} {count}" for name, count in self.tried.items())
        return f"seeds {self.seeds[0]} to {self.seeds[-1]}; {each}"


def fuzz(seconds: float, *, first_seed: int, backend: str, device: str = "cpu") -> Fuzzed:
    """Rounds over all operators until the time is over; the last one is finished."""
    outcome = Fuzzed()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outcome.seeds.append(first_seed + len(outcome.seeds))
        for operator in OPERATORS:
            _round(outcome, operator, outcome.seeds[-1], ROUND, backend, device)
    return outcome


def fuzz_count(count: int, *, device: str, first_seed: int = 0) -> Fuzzed:
    """So many calls of the kernels or a few more; `benchmarks/gpu/check.py` asks for them."""
    outcome = Fuzzed()
    most = max(1, min(ROUND, count // len(OPERATORS)))
    while sum(outcome.tried.values()) < count:
        outcome.seeds.append(first_seed + len(outcome.seeds))
        for operator in OPERATORS:
            _round(outcome, operator, outcome.seeds[-1], most, "triton", device)
    return outcome


def _round(
    outcome: Fuzzed, operator: str, number: int, most: int, backend: str, device: str
) -> None:
    on_cpu = backend == "torch" or device != "cpu"

    @seed(number)
    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(operator, LONG if on_cpu else INTERPRETED, DTYPES if on_cpu else DTYPES[1:]))
    def run(call: Call) -> None:
        outcome.tried[operator] += 1
        check(operator, call, backend, device)

    try:
        run()
    # A failed check and any error of an operator are the same to the table.
    except Exception as error:
        outcome.wrong.append(f"{operator}, seed {number}: {error!r:.500}")


if __name__ == "__main__":
    # Decided when a kernel is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    given_seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    chosen = sys.argv[3] if len(sys.argv) > 3 else "torch"
    result = fuzz(float(sys.argv[1]), first_seed=given_seed, backend=chosen)
    print(result, *result.wrong, sep="\n")
    sys.exit(bool(result.wrong))
