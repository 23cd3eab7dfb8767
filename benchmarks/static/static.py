"""What the shipped kernels compile to, without a GPU: a table, and limits that fail.

Compiles every row of launch settings for NVIDIA's sm_80, sm_90 and sm_100 and AMD's gfx942, and
reads the machine code. `--quick` takes, in bfloat16, one row of each piece of code on sm_90, since
rows that differ in the sizes of tensors alone are the same code, and elsewhere one for each line of
limits. The tests do so for all three from NVIDIA.

    python benchmarks/static/static.py --out benchmarks/results/static.json

`held` is how many programs a processor holds, and `copies` how many of the loads in the largest
loop are asynchronous. `clocks` are those of a processor for one pass through the main loop: issuing
it / its products on tensor cores. `instr/B` is the number of warp instructions for each byte that
must move between memory and chip, all work on a sample counted: a GPU can issue only so many
(gpu/timing.py), so above that a kernel cannot keep up with its memory. `floor` is the time that the
bytes of a batch of 256 take on the named GPUs of that architecture. Exit status 1 when a limit of
limits.py is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from limits import Limits, limits_of, one_of_each, window_of
from sass import Code, Instruction, load_widths, moved_bytes, read_code

from coded_resnext.kernels.build.build import BuildError, build, load_rows
from coded_resnext.training.run_folder import describe_machine

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
from timing import GPUS

ARCHS = ("sm80", "sm90", "sm100", "gfx942")
ROWS = "limits:rows"
BATCH = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="one row of each piece of code")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
    parser.add_argument("--folder", type=Path, default=Path("build/static"), help="of the build")
    parser.add_argument("--jobs", type=int, help="processes (default: processors)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()

    def wanted(name: str, arch: str) -> bool:
        return arguments.only in name and (not arguments.quick or name in one_of_each(arch))

    # Where the processes that compile find the rows.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    try:
        figures = measure(arguments.arch or ARCHS, arguments.folder, wanted, arguments.jobs)
    except BuildError as error:
        print(f"static: {error}", file=sys.stderr)
        return 1
    print(table(figures))
    if arguments.out is not None:
        arguments.out.write_text(as_json(describe_machine(), figures), encoding="utf-8")
    faults = [f"{row['arch']} {row['row']}: {fault}" for row in figures for fault in row["faults"]]
    print("\n".join(["", *faults, f"{len(figures)} kernels compiled, {len(faults)} limits broken"]))
    return int(bool(faults))


def measure(
    archs: Sequence[str],
    folder: Path,
    wanted: Callable[[str, str], bool],
    jobs: int | None,
    source: str = ROWS,
) -> list[dict[str, Any]]:
    """Returns the figures of every row and architecture, with the limits that it breaks."""
    built = build(archs, folder, source=source, wanted=wanted, jobs=jobs, gather=False)
    rows = {arch: dict(load_rows(source, arch)) for arch in archs}
    entries = [entry for of_arch in built.values() for entry in of_arch]
    # The disassembler is a process of its own, so threads are enough.
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda e: figures_of(e, rows[e["arch"]][e["row"]]), entries))


def figures_of(entry: dict[str, Any], row: Any) -> dict[str, Any]:
    """Returns what one compiled row is like."""
    folder = Path(entry["folder"])
    code = read_code(folder)
    kernel = row.kernel.rpartition(":")[2]
    (metadata,) = (path for path in folder.glob("*.json") if not path.name.startswith("__grp__"))
    loop = code.main_loop()
    around = max(code.loops(), key=len, default=loop)
    shared = json.loads(metadata.read_text(encoding="utf-8"))["shared"]
    limits = limits_for(kernel, row)
    # Of a kernel that something else bounds, or that moves next to nothing, it would say nothing.
    bound = limits is not None and limits.per_byte is not None
    per_byte = round(instructions_per_byte(code, row), 4) if bound else None
    figures: dict[str, Any] = {
        "row": entry["row"],
        "kernel": kernel,
        "arch": entry["arch"],
        "warps": row.num_warps,
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": shared,
        "held": programs_held(code.registers, row.num_warps, shared, entry["arch"]),
        # Of the largest loop: copies that go on while it computes, among its loads.
        "copies": sum(item.name.startswith("LDGSTS") for item in around),
        "instructions": len(code.instructions),
        "matrix_instructions": sum(item.is_matrix for item in code.instructions),
        "loop_instructions": len(loop),
        "loop_load_bits": {8 * width: count for width, count in sorted(load_widths(loop).items())},
        "instructions_per_byte": per_byte,
        "loop_clocks": loop_clocks(loop, row.num_warps, entry["arch"]),
        "sample_bytes": row.sample_bytes,
        "floor_us": {
            gpu.name: round(1e6 * gpu.floor(BATCH * row.sample_bytes), 2)
            for gpu in GPUS
            if gpu.arch == entry["arch"]
        },
    }
    return {**figures, "faults": faults_of(figures, row)}


# Shared memory of a processor in KiB, of which each program takes one more than it asks for.
SHARED = {"sm80": 164, "sm90": 228, "sm100": 228}


def programs_held(registers: int, warps: int, shared: int, arch: str) -> int | None:
    """Returns how many programs a processor of NVIDIA holds at a time, by what they take of it."""
    if arch not in SHARED:
        return None
    # Registers are given to a warp by eight a thread.
    of_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, SHARED[arch] * 1024 // (shared + 1024), 64 // warps)


# What a file of results holds of each row, one row a line.
COLUMNS = (
    *("row", "arch", "warps", "registers", "spilled", "shared", "instructions"),
    *("matrix_instructions", "loop_instructions", "loop_load_bits", "instructions_per_byte"),
    *("loop_clocks", "sample_bytes", "faults"),
)


def as_json(machine: dict[str, Any], figures: Sequence[dict[str, Any]]) -> str:
    """Returns the figures as the text of a results file: the names of the columns, then the
    rows."""
    rows = [json.dumps([row[name] for name in COLUMNS]) for row in figures]
    head = json.dumps({"machine": machine, "columns": COLUMNS}, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def read_rows(text: str) -> list[dict[str, Any]]:
    """Returns the rows of a results file, by the names of their columns."""
    content = json.loads(text)
    return [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


def loop_clocks(loop: Sequence[Instruction], warps: int, arch: str) -> dict[str, float]:
    """Returns the clocks of a processor for one pass through a loop: for issuing it, and for its
    products.

    A product hides behind the tensor cores what issues in less time than they take.
    """
    products = sum(item.products for item in loop)
    gpu = next((gpu for gpu in GPUS if gpu.arch == arch), None)
    if gpu is None or not products:
        return {}
    return {"issue": len(loop) * warps / 4, "products": products * warps / gpu.products}


def instructions_per_byte(code: Code, row: Any) -> float:
    """Returns the warp instructions that a program spends on a sample, over the bytes that are its
    share of it.

    All of its work counts, what comes before the loop over samples divided among them.
    """
    sizes = dict(row.constexprs)
    if "PIXELS" not in sizes:
        # Maps of any size: the main loop alone, which is all that a large one costs. Its trips are
        # counted when it runs, so that it holds one; what it reads twice is no reason to doubt it.
        loop = code.main_loop()
        # With steps, what the loop around them issues; its first steps may stand in front of them.
        around = [body for body in code.loops() if row.steps > 1 and _is_inside(loop, body)]
        count = max(map(len, around), default=len(loop))
        # Without a loop around it the main one has been joined with that, and holds all steps.
        count += (row.steps - 1) * len(loop) if len(around) > 1 else 0
        return count * row.num_warps / row.trip_bytes if row.trip_bytes else 0.0
    trips = math.ceil(sizes["PIXELS"] / sizes["BLOCK_P"])
    steps, samples = sizes.get("STEPS", 1), sizes.get("SAMPLES", 1)
    # The loops of the source from the outside in; those of one pass are not in the code.
    levels = [n for n in (samples, steps, trips) if n > 1]
    loops = [body for body in code.loops() if moved_bytes(body)]
    leaves = [b for b in loops if not any(o is not b and _is_inside(o, b) for o in loops)]

    def depth(body: Sequence[Instruction]) -> int:
        return min(sum(_is_inside(body, other) for other in loops), len(levels))

    def weight(address: int) -> float:
        """Returns how often an instruction is issued for all samples of a program together."""
        around = [body for body in loops if body[0].address <= address <= body[-1].address]
        if not around:
            return 1.0
        body = min(around, key=len)
        # Levels that are missing on the inside were unrolled, the innermost first.
        product = float(math.prod(levels[: depth(body)]))
        if len(leaves) == 1 and depth(body) == len(levels) and trips > 1:
            # Unrolled in part: the body holds as many trips as its bytes tell.
            held = moved_bytes(body) * code.lanes * row.num_warps / row.trip_bytes
            product *= math.ceil(trips / max(1, round(held))) / trips
        return product

    count = sum(weight(item.address) for item in code.instructions) / samples
    windows = sizes.get("WINDOWS", 1) * sizes.get("GROUP", 1) * steps
    share = min(1.0, windows / sizes.get("BRANCHES", windows))
    return count * row.num_warps / (row.sample_bytes * share)


def _is_inside(body: Sequence[Instruction], other: Sequence[Instruction]) -> bool:
    return other[0].address <= body[0].address and body[-1].address <= other[-1].address


def limits_for(kernel: str, row: Any) -> Limits | None:
    """Returns the limits of a row's kernel, by the channels of its windows where it has windows."""
    return limits_of(kernel, window_of(row))


def faults_of(figures: dict[str, Any], row: Any) -> list[str]:
    """Returns the limits that a compiled row breaks, in words."""
    limits = limits_for(figures["kernel"], row)
    if limits is None:
        return ["no limits are stated for this kernel"]
    faults = []
    if figures["spilled"]:
        faults.append(f"{figures['spilled']} spilling instructions, at most 0")
    half = "*bf16" in row.args or "*fp16" in row.args
    if half and limits.matrix and not figures["matrix_instructions"]:
        faults.append("no tensor-core instruction")
    if not half or figures["arch"].startswith("gfx"):
        return faults
    if figures["registers"] > limits.registers:
        faults.append(f"{figures['registers']} registers, at most {limits.registers}")
    per_byte = figures["instructions_per_byte"]
    if limits.per_byte is not None and not per_byte <= limits.per_byte:
        faults.append(f"{per_byte} instructions per byte, at most {limits.per_byte}")
    loads = figures["loop_load_bits"]
    narrow = loads and 2 * loads.get(128, 0) <= sum(loads.values())
    if limits.wide_loads and narrow and is_aligned(row):
        faults.append(f"loads of the main loop by bits {loads}, expected mostly 128")
    return faults


def is_aligned(row: Any) -> bool:
    """Returns whether windows of channels start at multiples of 16 bytes."""
    sizes = dict(row.constexprs)
    return 2 * sizes.get("WIDTH", 8) * sizes.get("GROUP", 1) % 16 == 0


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Returns the figures as text, one line a row."""
    head = (
        "kernel",
        "arch",
        "warps",
        "regs",
        "spill",
        "shared",
        "held",
        "copies",
        "matrix",
        "loop",
        "load bits",
        "clocks",
    )
    lines = [(*head, "instr/B", "of GPU", "floor us", "")]
    for row in figures:
        gpu = next((gpu for gpu in GPUS if gpu.arch == row["arch"]), None)
        per_byte = row["instructions_per_byte"]
        loads = row["loop_load_bits"]
        lines.append(
            (
                row["row"],
                row["arch"],
                row["warps"],
                row["registers"],
                row["spilled"],
                row["shared"],
                row["held"] or "",
                row["copies"],
                row["matrix_instructions"],
                row["loop_instructions"],
                " ".join(f"{count}x{bits}" for bits, count in loads.items()),
                " / ".join(f"{value:.0f}" for value in row["loop_clocks"].values()),
                "" if per_byte is None else f"{per_byte:.3f}",
                f"{per_byte / gpu.issue_per_byte:.0%}" if gpu and per_byte is not None else "",
                " ".join(str(value) for value in row["floor_us"].values()),
                "FAIL" if row["faults"] else "",
            )
        )
    widths = [max(len(str(line[n])) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            f"{item!s:<{w}}" if n == 0 else f"{item!s:>{w}}"
            for n, (item, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
