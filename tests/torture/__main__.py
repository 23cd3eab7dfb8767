"""The long versions of the tests of survival; `make torture` prints their figures as one table.

Columns: what was done, how often, what was lost by it (a run that cannot go on, a crash), and what
was wrong (other bits, another result, a fault that was not noticed). Exits with 1 unless the last
two are 0 in every row. `--only` takes rows by a part of their names.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

from support.malicious_files import ATTACKS, MARK
from torture.checkpoints import flip_bits, kill_while_saving
from torture.files import make_kinds, tamper_with
from torture.fuzz import fuzz
from torture.images import mutate_images
from torture.signals import Terminations, terminate_forked, terminate_torchrun

KILLS = 200
TERMINATIONS = 20
FLIPS = 100
TAMPERED = 1000
IMAGES = 20_000
FUZZ_SECONDS = {"torch": 480.0, "triton": 300.0}


@dataclass
class Row:
    """One row of the table."""

    fault: str
    tries: int
    lost: int
    wrong: int
    note: str = ""

    def __str__(self) -> str:
        return f"| {self.fault} | {self.tries} | {self.lost} | {self.wrong} | {self.note} |"


def main() -> int:
    """Run all of it, or the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="rows with one of these in the name"
    )
    parser.add_argument("--minutes", type=float, help="for the random calls, instead of 13")
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "safetensors"))
    print(f"{date.today()}, Python {platform.python_version()}, {versions}\n")
    print("| fault | tries | lost | wrong | and |")
    print("|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for title, run in rows(Path(name), (arguments.minutes or 13) / 13):
            if any(part in title for part in arguments.only):
                for row in run():
                    print(row, flush=True)
                    failed |= bool(row.lost or row.wrong)
    return int(failed)


def rows(folder: Path, share: float) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """Names of the rows, and what makes them."""
    yield "SIGKILL", lambda: kills(folder / "kills")
    yield "bits", lambda: flips(folder / "flips")
    for processes, workers, whom in (
        (1, 0, "the process"),
        (2, 0, "one of two processes"),
        (1, 2, "the process and its two loader workers"),
    ):
        yield (
            "SIGTERM",
            lambda processes=processes, workers=workers, whom=whom: terminated(
                f"SIGTERM to {whom}",
                terminate_forked(
                    folder / whom.replace(" ", "-"),
                    times=TERMINATIONS,
                    processes=processes,
                    workers=workers,
                    seed=processes + workers,
                ),
            ),
        )
    yield (
        "SIGTERM to torchrun",
        lambda: terminated(
            "SIGTERM to torchrun with two processes",
            terminate_torchrun(folder / "torchrun", times=TERMINATIONS, processes=2, seed=3),
        ),
    )
    yield "malicious", lambda: malicious(folder / "malicious")
    for index in range(5):
        yield "tampered", lambda index=index: tampered(folder / f"tampered-{index}", index)
    yield "mutated images", lambda: images(folder / "images")
    for backend in FUZZ_SECONDS:
        yield "random calls", lambda backend=backend: random_calls(backend, share)


def kills(folder: Path) -> Iterator[Row]:
    """Processes killed while they save."""
    folder.mkdir()
    outcome = kill_while_saving(folder, kills=KILLS, seed=0)
    note = f"{outcome.unfinished} fell into the writing of a file"
    yield Row("SIGKILL while saving", outcome.tried, outcome.tried - outcome.resumable, 0, note)


def flips(folder: Path) -> Iterator[Row]:
    """Bits flipped in the last checkpoint."""
    folder.mkdir()
    noticed = flip_bits(folder, flips=FLIPS, generator=random.Random(0))  # noqa: S311
    note = f"{noticed} named, and the one before it used"
    yield Row("one bit of the last checkpoint flipped", FLIPS, 0, FLIPS - noticed, note)


def malicious(folder: Path) -> Iterator[Row]:
    """Files that would run code or take all memory."""
    tries = wrong = 0
    for attack in ATTACKS:
        for read in [attack.read] + ([attack.resume] if attack.suffix == ".pth" else []):
            inner = folder / str(tries) / "a" / "b"
            inner.mkdir(parents=True)
            os.chdir(inner)
            tries += 1
            try:
                read(inner)
            except ValueError:
                continue
            wrong += 1
    os.chdir(Path(__file__).parent)
    marks = len(list(folder.rglob(f"*{MARK}*")))
    yield Row("malicious checkpoint", tries, 0, wrong + marks, f"{len(ATTACKS)} kinds, none run")


def tampered(folder: Path, index: int) -> Iterator[Row]:
    """Files of one kind with random faults."""
    folder.mkdir()
    kind = make_kinds(folder)[index]
    outcome = tamper_with(kind, files=TAMPERED, seed=index)
    for text in outcome.wrong[:5]:
        print(text, file=sys.stderr)
    spare = -outcome.largest_growth / 2**20
    note = f"{outcome.refused} refused; memory stayed {spare:.0f} MiB below twice the file + 64 MiB"
    yield Row(f"tampered {kind.name}", outcome.tried, outcome.crashed, len(outcome.wrong), note)


def images(folder: Path) -> Iterator[Row]:
    """Image files with random faults."""
    folder.mkdir()
    outcomes = mutate_images(folder, files=IMAGES, seed=0)
    for text in outcomes.escaped[:5]:
        print(text, file=sys.stderr)
    yield Row("mutated images", IMAGES, 0, len(outcomes.escaped), str(outcomes))


def random_calls(backend: str, share: float) -> Iterator[Row]:
    """Random calls of every operator."""
    where = {"torch": "on the CPU", "triton": "in Triton's interpreter"}[backend]
    outcome = fuzz(share * FUZZ_SECONDS[backend], first_seed=0, backend=backend)
    for text in outcome.wrong[:5]:
        print(text, file=sys.stderr)
    tries = sum(outcome.tried.values())
    yield Row(f"random calls of the operators {where}", tries, 0, len(outcome.wrong), str(outcome))


def terminated(what: str, outcome: Terminations) -> Iterator[Row]:
    """Runs that were told to stop."""
    lost = 2 * outcome.tried - outcome.clean - outcome.current
    note = f"{outcome.within_epoch} within an epoch; slowest exit {outcome.slowest:.1f} s"
    wrong = outcome.tried - outcome.same_bits + (outcome.slowest >= 10)
    yield Row(f"{what}, at a random moment", outcome.tried, lost, wrong, note)


if __name__ == "__main__":
    begun = time.perf_counter()
    status = main()
    print(f"\n{(time.perf_counter() - begun) / 60:.0f} minutes")
    sys.exit(status)
