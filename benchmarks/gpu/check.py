"""Every kernel on the GPU at hand: right, the same bits every time, and how fast.

    python benchmarks/gpu/check.py --out benchmarks/results

One command of less than eight minutes. First every operator and gradient against float64 at the
sizes of the paper's networks in every dtype, a hundred repeats, PyTorch's own checks of the
registered operators, and `torch.compile`; then the times of those that were right, beside eager and
compiled forms of the definition, and against the criteria below. Writes `gpu_check.json`.

Without a GPU it says so, in the file too, and exits with status 2. `--dry-run` takes every path at
tiny sizes on the CPU, the kernels in Triton's interpreter; its times mean nothing.

Exit status 1 when something is wrong; a criterion of speed that is missed is only reported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gpus import find_gpu
from torch._functorch import config as functorch_config

from coded_resnext.training.run_folder import describe_machine

RESULTS = "gpu_check.json"
MINUTES = 8.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPEATS = 100
# Samples of which the float64 definition forms the branch tensor at a time.
SAMPLES_AT_A_TIME = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop timing after these")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--random-calls",
        type=int,
        default=0,
        metavar="N",
        help="also try so many random sizes, layouts and types (5000: hours, since each compiles)",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / (f"dry_run_{RESULTS}" if arguments.dry_run else RESULTS)
    if arguments.dry_run:
        # Before the first kernel is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        torch.manual_seed(0)
    elif not torch.cuda.is_available():
        reason = "no GPU was available: nothing was checked and nothing was timed"
        write(path, {"machine": describe_machine(), "gpu": None, "reason": reason})
        print(f"gpu_check: {reason}; see --dry-run", file=sys.stderr)
        return 2
    # The same graph is run backward many times, which compiled graphs allow only without this.
    functorch_config.donated_buffer = False
    results = check(dry=arguments.dry_run, minutes=arguments.minutes)
    add_random_calls(results, arguments.random_calls)
    write(path, results)
    print(report(results))
    return int(bool(results["wrong"]))


def check(*, dry: bool, minutes: float) -> dict[str, Any]:
    """All checks and times, JSON-ready."""
    from agreement import compare, compiled, registration, repeats
    from block_check import check_blocks
    from conv1x1 import check_products
    from conv3x3 import check_grouped
    from model_check import check_models
    from operators import IMAGENET, OPERATORS, PLACES, TINY
    from timing import Deadline, measure, median_ms

    deadline = Deadline(minutes)
    device = torch.device("cpu" if dry else "cuda")
    places = TINY if dry else PLACES
    compiler = "aot_eager" if dry else "inductor"
    # Whatever a kernel is compared with is the library's best.
    torch.backends.cudnn.benchmark = True
    results: dict[str, Any] = {"machine": describe_machine(), "dry_run": dry}

    compiled_kernels = watch_compilation()
    print("agreement with float64")
    agreement = [
        compare(operator, place, dtype, device, SAMPLES_AT_A_TIME)
        for operator in OPERATORS
        for place in places
        for dtype in DTYPES
    ]
    print("repeats, registration, compilation")
    results |= {
        "agreement": agreement,
        "repeats": [
            repeats(operator, place, torch.bfloat16, device, 3 if dry else REPEATS)
            for operator in OPERATORS
            for place in places[:2]
        ],
        "registration": [
            result
            for operator in OPERATORS
            for result in registration(operator, TINY[0], torch.float32, device)
        ],
        "compilation": [
            compiled(operator, places[0], torch.bfloat16, device, compiler)
            for operator in OPERATORS
        ],
    }
    sections = ("agreement", "repeats", "registration", "compilation")
    results["wrong"] = [
        f"{section}: {row['operator']} {row['place']} {row['dtype']}: {fault}"
        for section in sections
        for row in results[section]
        for fault in row["wrong"]
    ]
    failed = {(row["operator"], row["place"], row["dtype"]) for row in agreement if row["wrong"]}

    print("times")
    bandwidth = None
    if not dry:
        results["bandwidth"] = bandwidths(median_ms)
        bandwidth = results["bandwidth"]["stated"]
    results["times"] = []
    # The sizes of the criteria first: if time runs out, it is the rest that is missing.
    for place in places[:1] if dry else places:
        for dtype in DTYPES[:1] if place not in IMAGENET[:2] and not dry else DTYPES:
            for operator in OPERATORS:
                if (operator.name, place.name, str(dtype).removeprefix("torch.")) in failed:
                    continue
                # Compiling is what takes the minutes.
                worth = place in (places[:1] if dry else IMAGENET[:2]) and dtype == DTYPES[0]
                results["times"] += measure(
                    operator, place, dtype, device, bandwidth, compiler if worth else None, deadline
                )
    results["kernels_found"] = compiled_kernels.count(True)
    results["kernels_compiled"] = compiled_kernels.count(False)
    results["criteria"] = criteria(results["times"])
    for section, check_section in (("grouped", check_grouped), ("products", check_products)):
        print({"grouped": "grouped convolutions", "products": "1x1 convolutions"}[section])
        results[section] = check_section(
            device,
            dry=dry,
            bandwidth=bandwidth,
            compiler=compiler,
            deadline=deadline,
            repeats=3 if dry else REPEATS,
        )
        results["wrong"] += [fault for row in results[section]["checks"] for fault in row["wrong"]]
    print("blocks in evaluation")
    results["blocks"] = check_blocks(device, dry=dry, repeats=3 if dry else REPEATS)
    results["wrong"] += [fault for row in results["blocks"]["checks"] for fault in row["wrong"]]
    print("whole networks")
    results["models"] = check_models(dry=dry, deadline=deadline)
    results["wrong"] += results["models"]["wrong"]
    results["left_out"] = [
        f"{row['operator']} {row['place']} {row['dtype']} {row['pass']}: {name}: {reason}"
        for row in results["times"]
        for name, reason in row["left_out"].items()
    ]
    return results


def add_random_calls(results: dict[str, Any], count: int) -> None:
    """Calls of every operator that hypothesis draws, in the GPU's kernels or the interpreter."""
    if count:
        sys.path.append(str(Path(__file__).parents[2] / "tests"))
        from torture.fuzz import fuzz_count

        fuzzed = fuzz_count(count, device="cpu" if results["dry_run"] else "cuda")
        results["random_calls"] = {"tried": fuzzed.tried, "seeds": fuzzed.seeds}
        results["wrong"] += fuzzed.wrong


def watch_compilation() -> list[bool]:
    """A list that grows by an entry for every kernel of the library that Triton is asked for.

    True where it was found compiled, which after `coded-resnext build-kernels` are all that the
    paper's networks launch.
    """
    import triton

    hits: list[bool] = []

    def listen(*, src: Any, cache_hit: bool, **_rest: Any) -> None:
        module = getattr(getattr(src, "fn", None), "__module__", "")
        if module.startswith("coded_resnext."):
            hits.append(cache_hit)

    triton.knobs.compilation.listener = listen
    return hits


def bandwidths(median_ms: Any) -> dict[str, float]:
    """Of the GPU's memory in bytes a second: as stated, and as a copy of a gigabyte measures it."""
    from triton.testing import get_dram_gbps

    known = find_gpu(torch.cuda.get_device_name())
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), source.device)
    stated = known.bandwidth if known else 1e9 * get_dram_gbps()
    return {"stated": stated, "copy": 2 * source.numel() / (ms / 1000)}


# Of which operator and pass, the ratio of which figure, and its bound; at the coded ImageNet
# stages, 160 px, bf16.
CRITERIA = (
    ("branch_energy", "forward", "over_floor", "at most", 1.3),
    ("coded_aggregate", "forward", "over_replaced", "at most", 1.25),
    ("coded_aggregate", "backward", "over_replaced", "at most", 1.25),
    ("coded_aggregate", "forward", "definition", "at least", 8.0),
    ("coded_aggregate", "backward", "definition", "at least", 8.0),
)


def criteria(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it was kept."""
    rows = []
    for operator, direction, figure, sense, bound in CRITERIA:
        for row in times:
            here = row["operator"] == operator and row["pass"] == direction
            if here and row["place"].endswith("160px") and row["dtype"] == "bfloat16":
                value = _figure(row, figure)
                kept = None
                if value is not None:
                    kept = value <= bound if sense == "at most" else value >= bound
                rows.append(
                    {
                        "operator": operator,
                        "place": row["place"],
                        "pass": direction,
                        "figure": figure,
                        "bound": f"{sense} {bound}",
                        "measured": value,
                        "kept": kept,
                    }
                )
    return rows


def _figure(row: dict[str, Any], name: str) -> float | None:
    """A ratio of a row: over the floor, over what the kernel replaced, or of another form to it."""
    ratios = row.get("over_kernel", {})
    if name == "over_floor":
        return row.get("over_floor")
    if name == "over_replaced":
        return 1 / ratios["replaced"] if "replaced" in ratios else None
    return ratios.get(name)


def report(results: dict[str, Any]) -> str:
    """The results as text."""
    from conv1x1 import report_products
    from conv3x3 import report_grouped
    from model_check import report_models

    lines = [
        "",
        f"{'operator, place, dtype, pass':<58} {'ms':>9} {'floor':>6}  other forms / kernel",
    ]
    for row in results["times"]:
        if "kernel" not in row["ms"]:
            continue
        label = f"{row['operator']} {row['place']} {row['dtype']} {row['pass']}"
        floor = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        others = ", ".join(f"{k} {v:.2f}" for k, v in row.get("over_kernel", {}).items())
        memory = row["peak_mib"].get("kernel")
        memory_text = "" if memory is None else f"; peak {memory:.0f} MiB"
        lines.append(f"{label:<58} {row['ms']['kernel']:>9.4f} {floor:>6}  {others}{memory_text}")
    lines.append("")
    for item in results["criteria"]:
        verdict = {True: "kept", False: "MISSED", None: "not measured"}[item["kept"]]
        measured = "" if item["measured"] is None else f"{item['measured']:.2f}, "
        lines.append(
            f"{item['operator']} {item['place']} {item['pass']} {item['figure']}: {measured}"
            f"{item['bound']}: {verdict}"
        )
    lines += report_grouped(results["grouped"])
    lines += report_products(results["products"])
    lines += report_models(results["models"])
    lines += [*(f"left out: {text}" for text in results["left_out"])]
    lines += [*(f"WRONG: {text}" for text in results["wrong"])]
    lines.append(
        f"{results['kernels_found']} kernels were found compiled, "
        f"{results['kernels_compiled']} were compiled now"
    )
    count = sum(len(results[n]) for n in ("agreement", "repeats", "registration", "compilation"))
    count += sum(len(results[name]["checks"]) for name in ("grouped", "products", "blocks"))
    lines.append(f"{count} checks, {len(results['wrong'])} wrong")
    if results["dry_run"]:
        lines.append("this was a dry run: the times above are those of an interpreter")
    return "\n".join(lines)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
