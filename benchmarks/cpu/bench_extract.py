"""Time of one image on the CPU: the classifier of one class beside the whole network.

Both with BatchNorm folded in, the whole network by the same code with the branches of all classes.
By turns, so that the machine's mood falls on both alike; medians. Before anything is timed, the
classifier's logit is compared with that of the masked network.

    python -m pytest benchmarks/cpu/bench_extract.py --benchmark-only \
        --results benchmarks/results/cpu_extract.json
    python benchmarks/render.py benchmarks/results/cpu_extract.json

What do thinned projection skips cost? For trained digits networks and every rank: the size of one
classifier beside its network, how well the classifiers tell their class on the test images (mean
average precision), and how often they decide as those with whole skips do, at the thresholds that
the runs chose on their training images.

    python benchmarks/cpu/bench_extract.py runs/digits-0 runs/digits-1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coded_resnext import CodedResNeXt, create_model, extract_classifier, extract_subset
from coded_resnext.data.datasets import load_digits_split
from coded_resnext.deploy.cost import network_cost
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import load_model

IMAGE_SIZES = {
    "coded_resnext29_10x11d": 32,
    "coded_resnext29_20x6d": 32,
    "coded_resnext50_32x4d": 224,
}
ROUNDS = 30
WARM_UP = 3
CLASS = 3
RANKS = (None, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
DIGITS_SIZE = 8
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", IMAGE_SIZES)
def test_one_image(
    name: str, layout: str, benchmark: Any, record: Callable[[dict[str, Any]], None]
) -> None:
    size = IMAGE_SIZES[name]
    torch.manual_seed(0)
    model = create_model(name)
    for block in model.blocks:
        # At its initial value, zero, this scale would leave out what the block computes.
        nn.init.constant_(block.expand_bn.weight, 0.5)
    model = model.eval().to(memory_format=FORMATS[layout])
    x = torch.randn(1, 3, size, size).to(memory_format=FORMATS[layout])
    whole = extract_subset(model, model.class_names, fold_batch_norm=True)
    part = extract_classifier(model, CLASS, fold_batch_norm=True)
    thin = extract_classifier(model, CLASS, fold_batch_norm=True, skip_rank=0.35)
    networks = {"whole": whole, "classifier": part, "thin": thin}
    check_equal(model, whole, part, x)
    for network in networks.values():
        network.to(memory_format=FORMATS[layout])

    seconds: dict[str, list[float]] = {key: [] for key in networks}

    def one_round() -> None:
        for key, network in networks.items():
            start = time.perf_counter()
            network(x)
            seconds[key].append(time.perf_counter() - start)

    with torch.inference_mode():
        benchmark.pedantic(one_round, rounds=WARM_UP + ROUNDS, warmup_rounds=0)
    median = {key: statistics.median(values[WARM_UP:]) for key, values in seconds.items()}
    cost = {key: network_cost(network, size) for key, network in networks.items()}
    row = {
        "network": name,
        "layout": layout,
        "image": size,
        **{f"{key}_ms": round(1000 * value, 2) for key, value in median.items()},
        "mac_ratio": round(cost["classifier"].macs / cost["whole"].macs, 3),
        "classifier_over_whole": round(median["classifier"] / median["whole"], 3),
        "thin_mac_ratio": round(cost["thin"].macs / cost["whole"].macs, 3),
        "thin_over_whole": round(median["thin"] / median["whole"], 3),
    }
    benchmark.extra_info.update(row)
    record(row)


@torch.inference_mode()
def check_equal(model: CodedResNeXt, whole: nn.Module, part: nn.Module, x: torch.Tensor) -> None:
    """What is timed is right, to float32 rounding."""
    torch.testing.assert_close(whole(x), model(x), rtol=1e-3, atol=1e-3)
    expected = model(x, keep=CLASS)[:, CLASS]
    torch.testing.assert_close(part(x), expected, rtol=1e-3, atol=1e-3)


def main() -> None:
    """Prints what thinned projections cost and keep, for networks trained on the digits."""
    from sklearn.metrics import average_precision_score

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or shipped weights")
    args = parser.parse_args()
    split = load_digits_split()
    positive = nn.functional.one_hot(split.test_targets).bool()
    runs = []
    for path in args.runs:
        model = load_model(path).model
        known = Companions(path, model).thresholds()
        thresholds = torch.tensor([known[name] for name in model.class_names])
        runs.append((model, thresholds, scores(model, split.test_images, None)))
    print("| rank | parameters | without projections | bytes | MACs | mean AP | lowest | same |")
    print("|---|---|---|---|---|---|---|---|")
    for rank in RANKS:
        precisions, same = [], []
        for model, thresholds, whole in runs:
            approximate = scores(model, split.test_images, rank)
            precisions.append(
                statistics.mean(
                    average_precision_score(positive[:, index], approximate[:, index])
                    for index in range(model.num_classes)
                )
            )
            same.append(
                float(((approximate >= thresholds) == (whole >= thresholds)).double().mean())
            )
        model = runs[0][0]
        share = network_cost(extract_classifier(model, 0, skip_rank=rank), DIGITS_SIZE).relative_to(
            network_cost(model, DIGITS_SIZE)
        )
        print(
            f"| {rank or 'whole'} | {share.parameters:.1%} | "
            f"{share.parameters_without_projections:.1%} | {share.bytes:.1%} | {share.macs:.1%} | "
            f"{statistics.mean(precisions):.4f} | {min(precisions):.4f} | "
            f"{statistics.mean(same):.2%} |"
        )


@torch.inference_mode()
def scores(model: CodedResNeXt, images: Tensor, rank: float | None) -> Tensor:
    """Returns the logits of all classifiers, `[n, K]`."""
    columns = [
        extract_classifier(model, index, skip_rank=rank)(images)
        for index in range(model.num_classes)
    ]
    return torch.stack(columns, 1)


if __name__ == "__main__":
    main()
