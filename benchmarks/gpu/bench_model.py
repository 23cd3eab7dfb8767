"""Training steps and inference of whole networks: this project, PyTorch's compiler, timm.

    python benchmarks/gpu/bench_model.py --out benchmarks/results/gpu_model.json --plot model.png

One run, the same images for all. Coded and plain networks by each backend; the plain one eager and
by `torch.compile`, in both layouts; timm's; and the published form of the coded one, which forms
the branch tensor. Logits are compared before anything is timed. A row has images a second, peak
memory, the kernels of a step, and what share of the time the least traffic of the blocks would
take (model_bytes.py), where a GPU's bandwidth is known.

`--tiny` takes every path at sizes that a CPU bears; its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, Runner, contenders
from gpus import find_gpu
from model_bytes import least_bytes
from torch import Tensor

from coded_resnext import CodedResNeXt, Stage, create_model
from coded_resnext.kernels import backends
from coded_resnext.training.run_folder import describe_machine

# Image size and batch of each network.
SETTINGS = {
    "resnext50_32x4d": (160, 256),
    "resnext29_20x6d": (32, 128),
    "resnext29_10x11d": (32, 128),
}
STEPS = 20
# How far logits of two ways to compute a network may be apart, relative to the largest: bfloat16
# rounds every map, some fifty times in a row.
AGREEMENT = {torch.bfloat16: 0.1, torch.float32: 1e-3}
# Stages, image size and batch of a dry run: a plain one, coded ones, a projection, a stride.
TINY_STAGES = (Stage(1, 16, 2, 8, 8), Stage(2, 16, 2, 10, 5, stride=2))
TINY = (8, 2)
TINY_CLASSES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="write the rows to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw images a second to this file")
    parser.add_argument("--network", action="append", choices=SETTINGS, help="(default: all)")
    parser.add_argument("--batch", type=int, help="images of a step (default: the network's)")
    parser.add_argument("--size", type=int, help="pixels of an edge (default: the network's)")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of each contender")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU")
    arguments = parser.parse_args()
    for name in ("batch", "size", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    for path in filter(None, (arguments.out, arguments.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: expected a folder that exists")
    if not torch.cuda.is_available() and not arguments.tiny:
        print("bench_model: no GPU was available: nothing was timed; see --tiny", file=sys.stderr)
        return 2
    content = bench_models(
        arguments.network or list(SETTINGS),
        batch=arguments.batch,
        size=arguments.size,
        steps=arguments.steps,
        compiled=not arguments.no_compile,
        tiny=arguments.tiny,
    )
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(content["rows"]))
    if arguments.plot is not None:
        plot(content["rows"], arguments.plot)
    return int(any(row["wrong"] for row in content["rows"]))


def bench_models(
    networks: list[str],
    *,
    batch: int | None = None,
    size: int | None = None,
    steps: int = STEPS,
    compiled: bool = True,
    tiny: bool = False,
) -> dict[str, Any]:
    """The rows of every network, JSON-ready."""
    rows = []
    for network in networks:
        for row in bench_network(network, batch, size, steps, compiled=compiled, tiny=tiny):
            print(json.dumps(row))
            rows.append(row)
    return {"machine": describe_machine(), "tiny": tiny, "rows": rows}


def bench_network(
    network: str, batch: int | None, size: int | None, steps: int, *, compiled: bool, tiny: bool
) -> Iterator[dict[str, Any]]:
    """A row for every contender; one that fails is named with its error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_size, default_batch = TINY if tiny else SETTINGS[network]
    batch, size = batch or default_batch, size or default_size
    overrides: dict[str, Any] = {}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    classes = TINY_CLASSES if tiny else create_model(network).num_classes
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    targets = torch.randint(classes, (batch,), generator=generator).to(device)
    expected: dict[str, Tensor] = {}
    kernels = backends()["triton"] is None and device.type == "cuda"
    for contender in contenders(network, kernels=kernels, compiled=compiled):
        if tiny:
            overrides = tiny_overrides(contender)
        row: dict[str, Any] = {
            "network": network,
            "contender": contender.name,
            "batch": batch,
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "wrong": None,
        }
        try:
            runner = Runner(contender, network, images, targets, dtype, overrides)
            logits = runner.infer().float()
            first = expected.setdefault(contender.kind, logits)
            apart = float((logits - first).abs().max() / first.abs().max())
            row["apart"] = apart
            if not apart <= AGREEMENT[dtype]:
                row["wrong"] = (
                    f"logits are {apart:.1e} apart from those of the first {contender.kind}"
                )
            else:
                row |= measure(runner, contender, batch, size, steps, dtype.itemsize)
        except (RuntimeError, ValueError) as error:
            row["wrong"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def tiny_overrides(contender: Contender) -> dict[str, Any]:
    """A network of a few channels in the place of a named one, with its classes."""
    if contender.kind == "timm":
        return {}
    coded = contender.kind == "coded"
    stages = [
        stage
        if coded
        else Stage(
            stage.depth,
            stage.channels,
            stage.width,
            stage.branches,
            stage.branches,
            stride=stage.stride,
        )
        for stage in TINY_STAGES
    ]
    return {
        "stages": stages,
        "num_classes": TINY_CLASSES,
        "stem": "conv3x3",
        "stem_channels": 8,
        "codebooks": None,
    }


def measure(
    runner: Runner, contender: Contender, batch: int, size: int, steps: int, item: int
) -> dict[str, Any]:
    """Times, memory and kernels of a contender that was found right."""
    row: dict[str, Any] = {}
    device = runner.images.device
    gpu = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    for name, run in (("train", runner.train), ("infer", runner.infer)):
        for _ in range(3):
            run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(run, device, steps)
        row[f"{name}_ms"] = 1000 * seconds
        row[f"{name}_images_per_second"] = batch / seconds
        if device.type == "cuda":
            row[f"{name}_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            row[f"{name}_kernels"] = kernels_of(run)
        if isinstance(runner.model, CodedResNeXt):
            moved = least_bytes(runner.model, batch, size, item, training=name == "train")
            row[f"{name}_least_bytes"] = moved
            if gpu is not None:
                row[f"{name}_floor_share"] = gpu.floor(moved) / seconds
    return row


def median_seconds(run: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Median time of a call, the device's work included."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def kernels_of(run: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with what each is to the best compiled plain network."""
    lines = [f"{'network, contender':<62} {'train/s':>9} {'ratio':>6} {'infer/s':>9} {'MiB':>7}"]
    for row in rows:
        label = f"{row['network']}: {row['contender']}"
        if row["wrong"]:
            lines.append(f"{label:<62} {row['wrong']}")
            continue
        rate = row["train_images_per_second"]
        best = best_plain(rows, row["network"])
        ratio = "" if best is None else f"{rate / best:.2f}"
        memory = row.get("train_peak_mib")
        memory_text = "" if memory is None else f"{memory:.0f}"
        infer = row["infer_images_per_second"]
        lines.append(f"{label:<62} {rate:>9.0f} {ratio:>6} {infer:>9.0f} {memory_text:>7}")
    return "\n".join(lines)


def best_plain(rows: list[dict[str, Any]], network: str) -> float | None:
    """Images a second that the best plain network layer by layer trains, compiled or not."""
    rates = [
        row["train_images_per_second"]
        for row in rows
        if row["network"] == network
        and not row["wrong"]
        and row["contender"].startswith("plain, torch,")
    ]
    return max(rates, default=None)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the images a second that each contender trains, a panel for each network."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(8, 1 + 3.2 * len(networks)), layout="constrained")
    for axes, network in zip(
        figure.subplots(len(networks), squeeze=False)[:, 0], networks, strict=True
    ):
        shown = [row for row in rows if row["network"] == network and not row["wrong"]]
        names = [row["contender"] for row in shown]
        axes.barh(names, [row["train_images_per_second"] for row in shown], color="tab:blue")
        axes.invert_yaxis()
        axes.set_title(network)
        axes.set_xlabel("images a second, training")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
