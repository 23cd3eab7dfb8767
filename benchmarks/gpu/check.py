"""Eight minutes on a GPU: are the kernels right, how fast are whole steps, and what takes the time?

    python benchmarks/gpu/check.py --out FOLDER

Stages (stages.py) run in this order, each in a process of its own. A row of results is in
FOLDER/gpu_check_STAGE.jsonl as soon as it is known, and a stage that crashes, hangs or runs out of
time costs no other: each has an estimate in seconds, and may take what the eight minutes have left
beside the estimates of those to come. At the end there is a summary of one screen. `--only` runs
some of the stages, and `--resume` those that an earlier command did not finish.

Without a GPU it says so, in FOLDER/gpu_check.json too, and exits with status 2. `--dry-run` takes
every path at tiny sizes on the CPU, the kernels in Triton's interpreter; its times mean nothing.

Exit status 1 when something is wrong or a stage did not finish.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import stages
import torch

from coded_resnext.training.run_folder import describe_machine

STAGES = ("build", "right", "headline", "profile", "operators", "networks", "guard")
# All of them at most.
SECONDS = 480.0
# A stage looks at its clock between rows; what a row may take longer.
GRACE = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    parser.add_argument("--resume", action="store_true", help="leave out what is finished")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of each stage, at most, whatever its estimate"
    )
    parser.add_argument(
        "--random-calls",
        type=int,
        default=0,
        metavar="N",
        help="also try so many random sizes, layouts and types (5000: hours, since each compiles)",
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        return run_stage(arguments)
    state = State(arguments.out, dry=arguments.dry_run)
    if not arguments.dry_run and not torch.cuda.is_available():
        reason = "no GPU was available: nothing was checked and nothing was timed"
        state.write(gpu=None, reason=reason)
        print(f"gpu_check: {reason}; see --dry-run", file=sys.stderr)
        return 2
    name = None if arguments.dry_run else torch.cuda.get_device_name()
    if not arguments.resume:
        state.content.clear()
    state.write(gpu=name)
    done = [name for name, outcome in state.stages.items() if outcome == "finished"]
    todo = {name: stages.expected(name) for name in arguments.only if name not in done}
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in todo.items())
    total = sum(todo.values()) / 60
    print(f"by estimate {total:.1f} minutes on an H100, of {SECONDS / 60:.0f}: {each}", flush=True)
    state.write(estimated_seconds={**state.content.get("estimated_seconds", {}), **todo})
    end = time.monotonic() + SECONDS
    for stage, estimate in list(todo.items()):
        del todo[stage]
        start = time.monotonic()
        limit = arguments.seconds or end - start - GRACE - sum(todo.values())
        print(f"--- {stage}, about {estimate:.0f} s, at most {limit:.0f} s", flush=True)
        state.path(stage).unlink(missing_ok=True)
        outcome = started(stage, arguments, limit)
        seconds = time.monotonic() - start
        taken = {**state.content.get("seconds", {}), stage: seconds}
        state.write(stages={**state.stages, stage: outcome}, seconds=taken)
        print(f"--- {stage}: {outcome} after {seconds:.0f} s", flush=True)
    print(summary(state))
    good = all(state.stages.get(stage) == "finished" for stage in arguments.only)
    return int(not good or any(faults(state)))


class State:
    """The files of a check.

    Args:
        folder: of the files.
        dry: whether it is a dry run, whose files have names of their own.
    """

    def __init__(self, folder: Path, *, dry: bool) -> None:
        self._folder, self._prefix = folder, "dry_run_gpu_check" if dry else "gpu_check"
        self.content: dict[str, Any] = {}
        if self._own.exists():
            self.content = json.loads(self._own.read_text(encoding="utf-8"))

    @property
    def _own(self) -> Path:
        return self._folder / f"{self._prefix}.json"

    @property
    def stages(self) -> dict[str, str]:
        """Returns what became of each stage."""
        stages: dict[str, str] = self.content.get("stages", {})
        return stages

    def path(self, stage: str) -> Path:
        """Returns the file of a stage's rows."""
        return self._folder / f"{self._prefix}_{stage}.jsonl"

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Returns the rows of a stage so far; a line that was cut off is not among them."""
        path = self.path(stage)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def write(self, **changes: Any) -> None:
        """Write the machine and what became of the stages."""
        self.content = {**self.content, "machine": describe_machine(), **changes}
        self._own.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def started(stage: str, arguments: argparse.Namespace, limit: float) -> str:
    """Runs a stage in a process of its own, and says what became of it."""
    command = [sys.executable, __file__, "--out", str(arguments.out), "--stage", stage]
    command += ["--seconds", str(limit), "--random-calls", str(arguments.random_calls)]
    command += ["--dry-run"] * arguments.dry_run
    # Read as Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if arguments.dry_run else None
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        status = process.wait(limit + GRACE)
    except subprocess.TimeoutExpired:
        # With the compilers that it may have started.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    if status == 0:
        return "finished"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def run_stage(arguments: argparse.Namespace) -> int:
    """Writes the rows of a stage, one by one, in the stage's own process."""
    torch.manual_seed(0)
    if not arguments.dry_run:
        # A graph is captured on the stream that its forward pass ran on, never the default one.
        torch.cuda.set_stream(torch.cuda.Stream())
    state = State(arguments.out, dry=arguments.dry_run)
    task = stages.Task(
        dry=arguments.dry_run,
        deadline=stages.Deadline(arguments.seconds / 60),
        random_calls=arguments.random_calls,
    )
    with state.path(arguments.stage).open("a", encoding="utf-8") as file:
        for row in task.rows(getattr(stages, arguments.stage)(task)):
            file.write(json.dumps(row, default=str) + "\n")
            file.flush()
            print(json.dumps(row, default=str)[:200], flush=True)
    return 0


def faults(state: State) -> Iterator[str]:
    """Yields what is wrong, stage by stage."""
    for stage in STAGES:
        for row in state.rows(stage):
            yield from (f"{stage}: {row['what']}: {fault}" for fault in row.get("wrong") or ())


def summary(state: State) -> str:
    """Returns the summary: one screen of text."""
    lines = ["", f"{'a training step':<58} {'ms':>8} {'host ms':>8} {'images/s':>9} {'MiB':>6}"]
    rows = [row for row in state.rows("headline") if "ms" in row]
    for row in rows:
        memory = f"{row['peak_mib']:.0f}" if row.get("peak_mib") else ""
        lines.append(
            f"{row['what']:<58} {row['ms']:>8.1f} {row['host_ms']:>8.1f} "
            f"{row['images_per_second']:>9.0f} {memory:>6}"
        )
    plain = best(rows, "plain")
    coded = best(rows, "coded")
    if plain and coded:
        lines.append(
            f"best coded {coded['ms']:.1f} ms ({coded['what']}), best plain {plain['ms']:.1f} ms "
            f"({plain['what']}): coded is {plain['ms'] / coded['ms']:.2f} times as fast"
        )
    for row in state.rows("profile"):
        lines.append(f"{row['what']}: {row.get('device_ms', 0):.1f} ms of the device, longest:")
        for kernel in row.get("kernels", [])[:6]:
            share = f", {kernel['share']:.0%} of the bandwidth" if "share" in kernel else ""
            text = f"    {kernel['ms']:6.2f} ms in {kernel['count']:4} x {kernel['name'][:60]}"
            lines.append(text + share)
    for row in [*state.rows("networks"), *state.rows("guard")]:
        if "ms" in row:
            text = f"{row['what']:<58} {row['ms']:>8.2f} {row['host_ms']:>8.2f}"
            lines.append(f"{text} {row['images_per_second']:>9.0f}")
        elif "kept" in row:
            verdict = "met" if row["kept"] else "MISSED"
            lines.append(
                f"accuracy guard: {row['apart']:.4f} apart, noise {row['noise']:.4f}: {verdict}"
            )
    slow = [
        f"    {row['what']}, {row['pass']}: {row['over_floor']:.2f} of its floor"
        for row in sorted(state.rows("operators"), key=lambda r: -(r.get("over_floor") or 0))
        if row.get("over_floor")
    ]
    lines += ["furthest from the least time for their bytes:", *slow[:6]] if slow else []
    wrong = list(faults(state))
    lines += [f"WRONG: {fault[:160]}" for fault in wrong[:12]]
    checks = sum("wrong" in row for stage in STAGES for row in state.rows(stage))
    taken, estimated = (state.content.get(key, {}) for key in ("seconds", "estimated_seconds"))
    minutes, expected = (sum(times.values()) / 60 for times in (taken, estimated))
    lines.append(f"{checks} checks, {len(wrong)} wrong")
    lines.append(f"{minutes:.1f} minutes, by estimate {expected:.1f}; stages:")
    ended = [
        f"{stage} {outcome}, {taken[stage]:.0f} s for {estimated[stage]:.0f}"
        for stage, outcome in state.stages.items()
    ]
    lines += textwrap.wrap("; ".join(ended), 96, initial_indent="    ", subsequent_indent="    ")
    if state.content.get("gpu") is None:
        lines.append("this was a dry run: the times above are those of an interpreter")
    return "\n".join(lines)


def best(rows: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """Returns the fastest of a kind of network."""
    chosen = [row for row in rows if row["what"].startswith(kind)]
    return min(chosen, key=lambda row: float(row["ms"]), default=None)


if __name__ == "__main__":
    sys.exit(main())
