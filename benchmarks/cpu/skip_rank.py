"""What thinned projection skips do to the classifiers of trained digits networks, as a table.

For every rank the size of one classifier beside its network, how well the classifiers tell their
class on the test images (mean average precision), and how often they decide as those with whole
skips do, at the thresholds that the runs chose on their training images.

    python benchmarks/cpu/skip_rank.py runs/digits-0 runs/digits-1
"""

from __future__ import annotations

import statistics
import sys

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from coded_resnext import CodedResNeXt, extract_classifier
from coded_resnext.data.datasets import load_digits_split
from coded_resnext.deploy.cost import network_cost
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import load_model

RANKS = (None, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
SIZE = 8


def main() -> None:
    split = load_digits_split()
    positive = torch.nn.functional.one_hot(split.test_targets).bool()
    runs = []
    for path in sys.argv[1:]:
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
        share = network_cost(extract_classifier(model, 0, skip_rank=rank), SIZE).relative_to(
            network_cost(model, SIZE)
        )
        print(
            f"| {rank or 'whole'} | {share.parameters:.1%} | "
            f"{share.parameters_without_projections:.1%} | {share.bytes:.1%} | {share.macs:.1%} | "
            f"{statistics.mean(precisions):.4f} | {min(precisions):.4f} | "
            f"{statistics.mean(same):.2%} |"
        )


@torch.inference_mode()
def scores(model: CodedResNeXt, images: Tensor, rank: float | None) -> Tensor:
    """The logits of all classifiers, `[n, K]`."""
    columns = [
        extract_classifier(model, index, skip_rank=rank)(images)
        for index in range(model.num_classes)
    ]
    return torch.stack(columns, 1)


if __name__ == "__main__":
    main()
