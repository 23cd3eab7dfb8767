"""Whole networks on the GPU at hand: the criteria of a training step, and the accuracy guard.

A part of check.py. ResNeXt-50, coded and plain, by the contenders of bench_model.py; then 200
steps on CIFAR-10, fused and layer by layer, from the same weights.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch
from bench_model import STEPS, TINY, TINY_CLASSES, bench_network, tiny_overrides
from contenders import Contender, Runner, contenders
from timing import Deadline
from torch import Tensor

from coded_resnext.data.datasets import DATA_VARIABLE, load_dataset
from coded_resnext.data.image_sets import MemoryImages
from coded_resnext.kernels import backends

NETWORK, GUARD_NETWORK = "resnext50_32x4d", "resnext29_10x11d"
GUARD_STEPS, GUARD_BATCH, GUARD_LR = 200, 128, 0.05
GUARD_RULE = (
    "the mean loss of the last quarter of the steps differs from that of layer by layer, in the "
    "same order of the images, by at most the range of layer by layer over three orders"
)
TRAIN, INFER, MEMORY = "train_images_per_second", "infer_images_per_second", "train_peak_mib"
# What is promised of the coded network that trains fastest, of which figure, its ratio to the best
# of which rivals (kind, backend, mode; empty for any), and the bound.
CRITERIA = (
    ("training beside plain, compiled", TRAIN, ("plain", "torch", "compiled"), "at least", 1.25),
    ("training beside any plain", TRAIN, ("plain", "", ""), "at least", 0.98),
    ("training beside the definition", TRAIN, ("coded", "reference", "eager"), "at least", 8.0),
    ("peak memory beside plain, eager", MEMORY, ("plain", "torch", "eager"), "at most", 1.0),
    ("inference beside plain, compiled", INFER, ("plain", "torch", "compiled"), "at least", 1.5),
)


def check_models(*, dry: bool, deadline: Deadline) -> dict[str, Any]:
    """All of it, JSON-ready; contenders that the time does not suffice for are named."""
    rows: list[dict[str, Any]] = []
    running = bench_network(NETWORK, None, None, 1 if dry else STEPS, compiled=not dry, tiny=dry)
    while not deadline.passed and (row := next(running, None)) is not None:
        rows.append(row)
    done = {row["contender"] for row in rows}
    kernels = backends()["triton"] is None and torch.cuda.is_available()
    every = contenders(NETWORK, kernels=kernels, compiled=not dry)
    return {
        "rows": rows,
        "left_out": [each.name for each in every if each.name not in done],
        "criteria": judge(rows),
        "guard": {"left_out": "time was up"} if deadline.passed else guard(dry=dry),
        "wrong": [f"{row['contender']}: {row['wrong']}" for row in rows if row["wrong"]],
    }


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it was kept; None where it was not."""
    right = [row for row in rows if not row["wrong"]]
    ours = [("coded", backend, "") for backend in ("torch", "fused", "triton")]
    coded = [row for row in right if any(_is(row, each) for each in ours)]
    best = max(coded, key=lambda row: float(row[TRAIN]), default=None)
    verdicts = []
    for name, figure, rival, sense, bound in CRITERIA:
        pick = min if sense == "at most" else max
        values = [row[figure] for row in right if _is(row, rival) and figure in row]
        mine = best and best.get(figure)
        if figure == INFER:
            mine = max((row[INFER] for row in coded), default=None)
        ratio = mine / pick(values) if mine and values else None
        kept = None
        if ratio is not None:
            kept = ratio <= bound if sense == "at most" else ratio >= bound
        verdicts.append(
            {"figure": name, "bound": f"{sense} {bound}", "measured": ratio, "kept": kept}
        )
    return verdicts


def _is(row: dict[str, Any], rival: tuple[str, str, str]) -> bool:
    """Whether a row is one of these; each part is how the row's begins."""
    parts = row["contender"].split(", ")
    return all(part.startswith(wanted) for part, wanted in zip(parts, rival, strict=False))


def guard(*, dry: bool) -> dict[str, Any]:
    """Losses of the fused network beside those layer by layer, and whether they agree."""
    steps = 4 if dry else GUARD_STEPS
    if dry:
        size, batch = TINY
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (16, 3, size, size), generator=generator, dtype=torch.uint8)
        targets = torch.randint(TINY_CLASSES, (16,), generator=generator)
    elif DATA_VARIABLE not in os.environ:
        return {"left_out": f"{DATA_VARIABLE} names no folder with cifar10"}
    else:
        batch, train = GUARD_BATCH, load_dataset("cifar10").train
        assert isinstance(train, MemoryImages)
        images, targets = train.pixels, train.targets
    kinds = {name: Contender("coded", name) for name in ("torch", "fused")}
    eager = [final_loss(kinds["torch"], images, targets, batch, steps, seed) for seed in range(3)]
    fused = final_loss(kinds["fused"], images, targets, batch, steps, 0)
    noise, apart = max(eager) - min(eager), abs(fused - eager[0])
    return {
        "rule": GUARD_RULE,
        "steps": steps,
        "layer_by_layer": eager,
        "fused": fused,
        "apart": apart,
        "noise": noise,
        # Written so that a NaN is not kept.
        "kept": apart <= noise,
    }


def final_loss(
    contender: Contender, images: Tensor, targets: Tensor, batch: int, steps: int, seed: int
) -> float:
    """Mean loss of the last quarter of a training, the images in the order of a seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    overrides = tiny_overrides(contender) if images.shape[-1] == TINY[0] else {}
    order = torch.Generator().manual_seed(seed)
    runner = Runner(contender, GUARD_NETWORK, images[:1].to(device), targets, dtype, overrides)
    for group in runner.optimizer.param_groups:
        group["lr"] = GUARD_LR
    # Of the dropped branches.
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=order)
        pixels = images[chosen].to(device).float() / 127.5 - 1
        runner.images = pixels.contiguous(memory_format=torch.channels_last)
        runner.targets = targets[chosen].to(device)
        losses.append(runner.train())
    return statistics.fmean(float(loss) for loss in losses[-(steps // 4) :])


def report_models(results: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    from bench_model import table

    lines = ["", "whole networks", table(results["rows"])]
    for item in results["criteria"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[item["kept"]]
        measured = "" if item["measured"] is None else f"{item['measured']:.2f}, "
        lines.append(f"{item['figure']}: {measured}{item['bound']}: {verdict}")
    guard = results["guard"]
    if "left_out" in guard:
        lines.append(f"accuracy guard left out: {guard['left_out']}")
    else:
        verdict = "met" if guard["kept"] else "MISSED"
        lines.append(
            f"accuracy guard, {guard['steps']} steps: {guard['apart']:.4f} apart, noise "
            f"{guard['noise']:.4f}: {verdict} ({guard['rule']})"
        )
    return lines + [f"left out, time was up: {name}" for name in results["left_out"]]
