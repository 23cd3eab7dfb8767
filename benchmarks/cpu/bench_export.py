"""Time and size of exported networks on the CPU: PyTorch, ONNX Runtime, and int8.

One image; the whole network and the classifier of one class, each with BatchNorm folded in and with
random weights. By turns, so that the machine's mood falls on all alike; medians. An ONNX file is
compared with PyTorch when it is written; ONNX Runtime gets as many threads as PyTorch.

    python -m pytest benchmarks/cpu/bench_export.py --benchmark-only \
        --results benchmarks/results/cpu_export.json
    python benchmarks/render.py benchmarks/results/cpu_export.json

Do they decide as the network does? On all test images of digits runs, for the network, its early
decoders, all one-class classifiers and the int8 network, each written as ONNX and run by ONNX
Runtime: how many decisions equal PyTorch's, the largest difference of the outputs, and the size of
the file.

    python benchmarks/cpu/bench_export.py digits    # or runs
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coded_resnext import CodedResNeXt, create_model, extract_classifier, extract_subset
from coded_resnext.data.datasets import DigitsSplit, load_digits_split
from coded_resnext.deploy.export import Heads, quantize_onnx, to_onnx
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import load_model

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
CALIBRATION_IMAGES = 320


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
    """Returns a session with PyTorch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path: Path, images: Tensor) -> list[Tensor]:
    """Returns what ONNX Runtime computes."""
    results = session(path).run(None, {"images": images.numpy()})
    return [torch.from_numpy(value) for value in results]


@torch.inference_mode()
def compare(
    model: CodedResNeXt, digits: DigitsSplit, thresholds: dict[str, float], folder: Path
) -> None:
    """Writes the networks, runs them, and prints a Markdown table."""
    x, targets = digits.test_images, digits.test_targets
    logits, decoded, margins = Heads(model)(x)
    said = logits.argmax(1)
    print("| what | equal decisions | accuracy | largest difference | KB |")
    print("|---|---|---|---|---|")

    def row(what: str, same: Tensor, right: float | None, difference: float, size: int) -> None:
        accuracy = "" if right is None else f"{right:.2%}"
        print(
            f"| {what} | {int(same.sum()):,} of {same.numel():,} | {accuracy} | "
            f"{difference:.1e} | {size / 1000:.0f} |"
        )

    whole = to_onnx(model, folder / "network.onnx", preprocessing=digits.preprocessing)
    int8 = quantize_onnx(
        whole, folder / "int8.onnx", digits.train_images[:CALIBRATION_IMAGES].split(32)
    )
    for what, path in (("network", whole), ("network, int8", int8)):
        (actual,) = outputs(path, x)
        classes = actual.argmax(1)
        right = float((classes == targets).double().mean())
        row(what, classes == said, right, _difference(actual, logits), path.stat().st_size)
    path = to_onnx(Heads(model), folder / "heads.onnx", preprocessing=digits.preprocessing)
    _, classes, actual = outputs(path, x)
    for block in range(classes.shape[1]):
        right = float((classes[:, block] == targets).double().mean())
        difference = _difference(actual[:, block], margins[:, block])
        same = classes[:, block] == decoded[:, block]
        row(f"early decoder {block + 1}", same, right, difference, path.stat().st_size)
    same, worst, sizes = [], 0.0, []
    for name, threshold in thresholds.items():
        part = extract_classifier(model, name, threshold=threshold, fold_batch_norm=True)
        path = to_onnx(part, folder / "part.onnx", preprocessing=digits.preprocessing)
        (actual,) = outputs(path, x)
        same.append((actual >= part.threshold) == part.predict(x))
        worst = max(worst, _difference(actual, part(x)))
        sizes.append(path.stat().st_size)
    row(f"{len(same)} classifiers", torch.stack(same), None, worst, sum(sizes) // len(sizes))


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


def main() -> int:
    """Compares every run that is named."""
    parser = argparse.ArgumentParser(description="Do exported networks decide as the network does?")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--classes", type=int, help="classifiers to compare [all]")
    arguments = parser.parse_args()
    for run in arguments.runs:
        print(f"\n{run}\n")
        with tempfile.TemporaryDirectory() as folder:
            model = load_model(run).model
            thresholds = Companions(run, model).thresholds()
            names = model.class_names[: arguments.classes]
            chosen = {name: thresholds.get(name) or 0.0 for name in names}
            compare(model, load_digits_split(), chosen, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
