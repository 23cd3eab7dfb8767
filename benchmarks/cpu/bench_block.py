"""One training step of every coded block of the paper's networks, on the CPU.

Side by side and interleaved, so that the machine's mood falls on all alike: the plain block, the
coded block by the Gram form, and the coded block by the unfused definition. Medians; memory that a
step adds in a process of its own. The outputs of the two coded forms are compared first.

    python -m pytest benchmarks/cpu/bench_block.py --benchmark-only \
        --results benchmarks/results/cpu_block_step.json
    python benchmarks/render.py benchmarks/results/cpu_block_step.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import VARIANTS, BlockShape, block_shapes

ROUNDS = 15
# The definition takes seconds; its share of the noise is small.
REFERENCE_ROUNDS = 3
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", list(block_shapes()), ids=lambda shape: shape.name)
def test_training_step(
    shape: BlockShape, layout: str, benchmark: Any, record: Callable[[dict[str, Any]], None]
) -> None:
    variants = VARIANTS if layout == "nchw" else ("plain", "coded")
    steps = {name: shape.make_step(name, FORMATS[layout]) for name in variants}
    if "reference" in steps:
        check_equal(steps["coded"], steps["reference"])
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def one_round() -> None:
        for name, step in steps.items():
            if name != "reference" or len(seconds[name]) < REFERENCE_ROUNDS:
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    # The first step of each allocates and compiles; it is not counted.
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    row: dict[str, Any] = {
        "block": shape.name,
        "layout": layout,
        **{f"{name}_ms": round(1000 * value, 2) for name, value in median.items()},
        "coded_over_plain": round(median["coded"] / median["plain"], 3),
    }
    if "reference" in median:
        row["reference_over_coded"] = round(median["reference"] / median["coded"], 2)
        for name in variants:
            row[f"{name}_step_mib"] = step_memory(shape.name, name)
    benchmark.extra_info.update(row)
    record(row)


def check_equal(coded: Any, reference: Any) -> None:
    """Same outputs from both forms, to float32 rounding, before anything is timed."""
    for step in (coded, reference):
        torch.manual_seed(1)
        step.outputs = step()
    for actual, expected in zip(coded.outputs, reference.outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def step_memory(name: str, variant: str) -> float:
    """Memory that a step adds, MiB, measured in a process of its own."""
    script = Path(__file__).with_name("step_memory.py")
    output = subprocess.run(
        [sys.executable, str(script), name, variant], check=True, capture_output=True, text=True
    )
    return float(output.stdout)
