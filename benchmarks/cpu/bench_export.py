"""Time and size of exported networks on the CPU: PyTorch, ONNX Runtime, and int8.

One image; the whole network and the classifier of one class, each with BatchNorm folded in and with
random weights. By turns, so that the machine's mood falls on all alike; medians. An ONNX file is
compared with PyTorch when it is written; ONNX Runtime gets as many threads as PyTorch.

    python -m pytest benchmarks/cpu/bench_export.py --benchmark-only \
        --results benchmarks/results/cpu_export.json
    python benchmarks/render.py benchmarks/results/cpu_export.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coded_resnext import create_model, extract_classifier, extract_subset
from coded_resnext.deploy.export import quantize_onnx, to_onnx

onnxruntime = pytest.importorskip("onnxruntime")

IMAGE_SIZES = {
    "coded_resnext_digits": 8,
    "coded_resnext29_10x11d": 32,
    "coded_resnext29_20x6d": 32,
    "coded_resnext50_32x4d": 224,
}
PARTS = ("whole", "classifier")
ROUNDS = 30
WARM_UP = 3
CLASS = 3


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", IMAGE_SIZES)
def test_one_image(
    name: str,
    part: str,
    tmp_path: Path,
    benchmark: Any,
    record: Callable[[dict[str, Any]], None],
) -> None:
    size = IMAGE_SIZES[name]
    torch.manual_seed(0)
    model = create_model(name).eval()
    for block in model.blocks:
        # At its initial value, zero, this scale would leave out what the block computes.
        nn.init.constant_(block.expand_bn.weight, 0.5)
    if part == "whole":
        network = extract_subset(model, model.class_names, fold_batch_norm=True)
    else:
        network = extract_classifier(model, CLASS, fold_batch_norm=True)
    images = torch.randn(33, model.in_channels, size, size)
    full = to_onnx(network, tmp_path / "full.onnx", image_size=size)
    small = quantize_onnx(full, tmp_path / "int8.onnx", images[1:].split(8))
    x = images[:1].to(memory_format=torch.channels_last)
    network.to(memory_format=torch.channels_last)
    runs = {
        "torch": partial(network, x),
        "onnx": partial(session(full).run, None, {"images": images[:1].numpy()}),
        "int8": partial(session(small).run, None, {"images": images[:1].numpy()}),
    }
    seconds: dict[str, list[float]] = {key: [] for key in runs}

    def one_round() -> None:
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)

    with torch.inference_mode():
        benchmark.pedantic(one_round, rounds=WARM_UP + ROUNDS, warmup_rounds=0)
    median = {key: statistics.median(values[WARM_UP:]) for key, values in seconds.items()}
    tensors = [*network.parameters(), *network.buffers()]
    row = {
        "network": name,
        "part": part,
        "image": size,
        **{f"{key}_ms": round(1000 * value, 2) for key, value in median.items()},
        "weights_mb": round(sum(value.nbytes for value in tensors) / 1e6, 2),
        "onnx_mb": round(full.stat().st_size / 1e6, 2),
        "int8_mb": round(small.stat().st_size / 1e6, 2),
        "onnx_over_torch": round(median["onnx"] / median["torch"], 3),
        "int8_over_onnx": round(median["int8"] / median["onnx"], 3),
    }
    benchmark.extra_info.update(row)
    record(row)


def session(path: Path) -> Any:
    """A session with PyTorch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
