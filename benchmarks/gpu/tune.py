"""Times the launch settings next to those in use, and prints those that are faster.

    python benchmarks/gpu/tune.py --op branch_energy
    python benchmarks/gpu/tune.py --op coded_aggregate --stage "32x4d c4" --dtype bf16

A tool for developers, for the GPU at hand: nothing of it runs when the library does. From the
settings in use it goes to those with one number twice or half as large, as long as that is faster.
A candidate whose results differ, that spills registers or does not compile is named and left out.
What it prints is entered by hand into `TUNED` of `kernels/rows.py`, for launches, for the static
table and for the ahead-of-time build alike.

Exit status 2 without a GPU. `--dry-run` takes the same way at tiny sizes on the CPU, in Triton's
interpreter: results are compared, and nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coded_resnext.kernels.rows import next_power_of_2

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The coding loss has settings of its own for no architecture: it takes as long as its launch.
OPERATORS = ("branch_energy", "coded_aggregate")
# A tile may be summed in another order: two roundings of the results, and of float32 sums.
AGREEMENT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}
# Faster by less is noise.
WORTH = 0.98
STEPS = 8

Settings = dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", required=True, choices=OPERATORS)
    parser.add_argument("--stage", default="", metavar="TEXT", help="those whose name holds this")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, untimed")
    arguments = parser.parse_args()
    if arguments.dry_run:
        # Before the first kernel is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("tune: no GPU was available: nothing was timed; see --dry-run", file=sys.stderr)
        return 2
    from operators import OPERATORS as ENTRIES
    from operators import STAGES, TINY
    from timing import median_ms

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    stages = [s for s in (TINY if arguments.dry_run else STAGES) if arguments.stage in s.name]
    if not stages:
        print(f"tune: --stage: no stage has {arguments.stage!r} in its name", file=sys.stderr)
        return 2
    operator = next(entry for entry in ENTRIES if entry.name == arguments.op)
    time = None if arguments.dry_run else lambda run: median_ms(run, device)
    lines: list[str] = []
    for stage in stages:
        print(f"{operator.name}, {stage.name}, {arguments.dtype}", flush=True)
        tuner = Tuner(operator, stage, DTYPES[arguments.dtype], device, time)
        for kernel in tuner.kernels:
            lines += tuner.tune(kernel)
    if arguments.dry_run:
        print("\nthis was a dry run: nothing was timed")
    else:
        print("\nfor TUNED of kernels/rows.py:", *(lines or ["nothing is faster"]), sep="\n")
    return 0


@dataclass(frozen=True)
class Launched:
    """A launch as it happened."""

    row: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    compiled: Any
    """Triton's compiled kernel; None in the interpreter."""

    def again(self) -> None:
        self.row.launch(self.grid, *self.args)


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """The launches meanwhile."""
    from coded_resnext.kernels.rows import LaunchRow

    launches: list[Launched] = []
    real = LaunchRow.launch

    def launch(row: Any, grid: tuple[int, ...], *args: Any) -> None:
        compiled = row.function()[grid](*args, **row.keywords)
        launches.append(Launched(row, grid, args, compiled))

    LaunchRow.launch = launch  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        LaunchRow.launch = real  # type: ignore[method-assign]


@contextmanager
def entered(key: tuple[str, str, str], settings: Mapping[str, int]) -> Iterator[None]:
    """An entry of the table for a while; rows that were made before are forgotten."""
    from coded_resnext.kernels.coded import rows as coded_rows
    from coded_resnext.kernels.rows import TUNED

    def forget() -> None:
        for value in vars(coded_rows).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    before = TUNED.get(key)
    TUNED[key] = settings
    forget()
    try:
        yield
    finally:
        TUNED.pop(key)
        if before is not None:
            TUNED[key] = before
        forget()


def neighbours(settings: Settings, constexprs: Mapping[str, int]) -> list[Settings]:
    """Returns the settings with one number twice or half as large that a kernel can be compiled
    with.

    A product has at least 16 rows, a tile no more pixels than the map padded to it, and there are
    no more warps than parts of 16 by 16 of the product, which they would only repeat.

    Args:
        settings: those to start from.
        constexprs: compile-time numbers of the row.
    """
    window, windows = constexprs["BLOCK_K"], constexprs.get("WINDOWS", 1)
    most = {
        "BLOCK_P": max(16, next_power_of_2(constexprs["PIXELS"])),
        "SAMPLES": 64,
        "num_warps": 16,
        "num_stages": 4,
    }
    least = {"BLOCK_P": 16, "SAMPLES": 1, "num_warps": 1, "num_stages": 1}
    candidates = []
    for name, value in settings.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, 2 * value)
        for new in steps:
            changed = {**settings, name: new}
            parts = max(1, windows * window**2 // 16**2)
            if least[name] <= new <= most[name] and changed["num_warps"] <= parts:
                candidates.append(changed)
    return candidates


class Tuner:
    """One operator at the sizes of a coded stage: its kernels, and their times with other settings.

    Args:
        operator: an entry of operators.py.
        stage, dtype, device: what it runs on.
        time: milliseconds of a call, or None to time nothing.
    """

    def __init__(
        self,
        operator: Any,
        stage: Any,
        dtype: torch.dtype,
        device: torch.device,
        time: Callable[[Callable[[], None]], float] | None,
    ) -> None:
        from operators import inputs_of, upstream_of

        from coded_resnext.kernels.layout import architecture
        from coded_resnext.kernels.rows import settings_of

        self.operator, self.stage, self.time = operator, stage, time
        self.tolerance = AGREEMENT[dtype]
        self.inputs = inputs_of(operator, stage, dtype, device)
        self.upstream = upstream_of(operator.kernel(self.inputs, stage))
        self.arch = architecture(torch.cuda.current_device()) if device.type == "cuda" else "cpu"
        self.expected, launches = self.run()
        self.kernels = [item.row.kernel for item in launches if settings_of(item.row)]

    def run(self) -> tuple[dict[str, Tensor], list[Launched]]:
        """Returns the outputs and gradients, and the launches that gave them."""
        from operators import evaluate

        with recorded() as launches:
            actual = evaluate(
                self.operator, self.operator.kernel, self.stage, self.inputs, self.upstream
            )
        return actual, launches

    def tune(self, kernel: str) -> list[str]:
        """Returns the line of the table for a kernel, or none where nothing is faster."""
        from coded_resnext.kernels.rows import settings_of, sizes_of

        _, launches = self.run()
        row = next(item.row for item in launches if item.row.kernel == kernel)
        key = (self.arch, kernel, sizes_of(row))
        start = settings_of(row)
        constexprs = dict(row.constexprs)
        print(f"  {kernel}")
        best, first = start, self.measure(key, kernel, start)
        least, tried = first, [start]
        for _ in range(STEPS if self.time else 1):
            candidates = [s for s in neighbours(best, constexprs) if s not in tried]
            times = [(self.measure(key, kernel, settings), settings) for settings in candidates]
            tried += candidates
            known = [(ms, settings) for ms, settings in times if ms is not None]
            if not known or least is None:
                break
            ms, settings = min(known, key=lambda item: item[0])
            if ms > WORTH * least:
                break
            least, best = ms, settings
        if first is None or least is None or best == start:
            return []
        entry = {name: value for name, value in best.items() if value != start[name]}
        return [f"    {key}: {entry},  # {1000 * least:.1f} us, {1000 * first:.1f} before"]

    def measure(self, key: tuple[str, str, str], kernel: str, settings: Settings) -> float | None:
        """Returns the milliseconds of a kernel with settings; None where it is not to be used, or
        untimed."""
        label = ", ".join(f"{name}={value}" for name, value in settings.items())
        try:
            with entered(key, settings):
                actual, launches = self.run()
        except Exception as error:
            print(f"    {label}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        launch = next(item for item in launches if item.row.kernel == kernel)
        spilled = getattr(launch.compiled, "n_spills", 0)
        fault = f"{spilled} spilled registers" if spilled else self.fault(actual)
        if fault:
            print(f"    {label}: left out: {fault}")
            return None
        if self.time is None:
            print(f"    {label}: right")
            return None
        ms = self.time(launch.again)
        print(f"    {label}: {1000 * ms:.1f} us", flush=True)
        return ms

    def fault(self, actual: Mapping[str, Tensor]) -> str | None:
        """Returns how results differ from those of the settings in use."""
        for name, value in actual.items():
            exact = self.expected[name].double()
            size = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            error = float((value.double() - exact).abs().max() / size)
            # Written so that a NaN is a fault.
            if not error <= self.tolerance:
                return f"{name} differs by {error:.1e}, at most {self.tolerance:.1e}"
        return None


if __name__ == "__main__":
    sys.exit(main())
