"""The long versions of the tests of survival; `make torture` prints their figures.

Exits with 1 when anything did not survive.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from torture_checkpoints import flip_bits, kill_while_saving
from torture_signals import Terminations, terminate_forked, terminate_torchrun

KILLS = 200
TERMINATIONS = 20
FLIPS = 100


def main() -> int:
    """Run all of it."""
    print("| what was done | how often | survived | and |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        failures = [files(Path(name)), signals(Path(name))]
    return int(any(failures))


def files(folder: Path) -> bool:
    """Kills and flipped bits; whether something was wrong."""
    (folder / "kills").mkdir()
    kills = kill_while_saving(folder / "kills", kills=KILLS, seed=0)
    print(
        f"| SIGKILL while saving | {kills.tried} | {kills.resumable} resumable | "
        f"{kills.unfinished} fell into the writing of a file |",
        flush=True,
    )
    (folder / "flips").mkdir()
    noticed = flip_bits(folder / "flips", flips=FLIPS, generator=random.Random(0))  # noqa: S311
    print(
        f"| one bit of the last checkpoint flipped | {FLIPS} | {noticed} named, and the one "
        "before it used | |",
        flush=True,
    )
    return kills.resumable < KILLS or noticed < FLIPS


def signals(folder: Path) -> bool:
    """Signals at random moments; whether something was wrong."""
    failed = False
    for processes, workers, whom in (
        (1, 0, "the process"),
        (2, 0, "one of two processes"),
        (1, 2, "the process and its two loader workers"),
    ):
        found = terminate_forked(
            folder / whom.replace(" ", "-"),
            times=TERMINATIONS,
            processes=processes,
            workers=workers,
            seed=processes + workers,
        )
        failed |= report(f"SIGTERM to {whom}", found)
    found = terminate_torchrun(folder / "torchrun", times=TERMINATIONS, processes=2, seed=3)
    return failed | report("SIGTERM to torchrun with two processes", found)


def report(what: str, found: Terminations) -> bool:
    """Print a row; whether something was wrong."""
    print(
        f"| {what}, at a random moment | {found.tried} | {found.clean} clean exits, "
        f"{found.current} with the current step, {found.same_bits} resumed to the same bits | "
        f"{found.within_epoch} within an epoch; slowest exit {found.slowest:.1f} s |",
        flush=True,
    )
    whole = found.tried == found.clean == found.current == found.same_bits
    return not (whole and found.slowest < 10)


if __name__ == "__main__":
    begun = time.perf_counter()
    status = main()
    print(f"\n{time.perf_counter() - begun:.0f} seconds", file=sys.stderr)
    sys.exit(status)
