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
    failed = False
    print("| what was done | how often | survived | and |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kills").mkdir()
        kills = kill_while_saving(folder / "kills", kills=KILLS, seed=0)
        failed |= kills.resumable < KILLS
        print(
            f"| SIGKILL while saving | {kills.tried} | {kills.resumable} resumable | "
            f"{kills.unfinished} fell into the writing of a file |",
            flush=True,
        )
        (folder / "flips").mkdir()
        noticed = flip_bits(folder / "flips", flips=FLIPS, generator=random.Random(0))  # noqa: S311
        failed |= noticed < FLIPS
        print(
            f"| one bit of the last checkpoint flipped | {FLIPS} | {noticed} named, and the one "
            "before it used | |",
            flush=True,
        )
        for processes in (1, 2):
            place = folder / f"forked-{processes}"
            found = terminate_forked(place, times=TERMINATIONS, processes=processes, seed=processes)
            to = "the process" if processes == 1 else "one of two processes"
            failed |= report(f"SIGTERM to {to}", found)
        found = terminate_torchrun(folder / "torchrun", times=TERMINATIONS, processes=2, seed=3)
        failed |= report("SIGTERM to torchrun with two processes", found)
    return int(failed)


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
