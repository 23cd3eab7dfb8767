"""Do exported networks decide as the network does? On all test images of digits runs.

For the network, its early decoders, all one-class classifiers and the int8 network, each written as
ONNX and run by ONNX Runtime: how many decisions equal PyTorch's, the largest difference of the
outputs, and the size of the file.

    python benchmarks/cpu/export_decisions.py digits    # or runs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from coded_resnext import CodedResNeXt, extract_classifier
from coded_resnext.data.datasets import DigitsSplit, load_digits_split
from coded_resnext.deploy.export import Heads, quantize_onnx, to_onnx
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import load_model

CALIBRATION_IMAGES = 320


def outputs(path: Path, images: Tensor) -> list[Tensor]:
    """What ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]


@torch.inference_mode()
def compare(
    model: CodedResNeXt, digits: DigitsSplit, thresholds: dict[str, float], folder: Path
) -> None:
    """Write, run and print a Markdown table."""
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
    """Compare every run that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
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
