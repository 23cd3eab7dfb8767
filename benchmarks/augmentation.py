"""Print how far the device's RandAugment is from timm's, operation by operation, as a table.

python benchmarks/augmentation.py --data-dir data --images 1000
python benchmarks/augmentation.py --data-dir data --images 1000 --device cuda
"""

from __future__ import annotations

import argparse

import torch

from coded_resnext.data.datasets import load_dataset
from coded_resnext.data.image_sets import MemoryImages
from coded_resnext.data.on_device import compare_operations
from coded_resnext.training.processes import run_script
from coded_resnext.training.recipe import DataConfig
from coded_resnext.training.run_folder import describe_machine

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", default="cifar10", help="cifar10, cifar100 or synthetic")
    parser.add_argument("--data-dir", help="where the data are")
    parser.add_argument("--images", type=int, default=1000, help="training images, of all classes")
    parser.add_argument("--aa", default="rand-m4-n3", help="timm's RandAugment")
    parser.add_argument("--device", default="cpu", help="of the tensors")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Compare and print."""
    splits = load_dataset(arguments.dataset, arguments.data_dir, train_images=arguments.images)
    images = splits.train
    assert isinstance(images, MemoryImages)
    preprocessing = DataConfig(img_size=32, mean=CIFAR_MEAN, std=CIFAR_STD).preprocessing
    print("| operation | mean difference | largest | differing, % | what the operation changes |")
    print("|---|---|---|---|---|")
    for found in compare_operations(
        images, arguments.aa, preprocessing, torch.device(arguments.device)
    ):
        print(
            f"| {found.operation} | {found.mean_difference:.4f} | {found.largest_difference} | "
            f"{100 * found.differing:.3f} | {found.change:.1f} |",
            flush=True,
        )
    machine = describe_machine()
    print(f"\n{machine.get('gpu', machine['cpu'])}, {machine['versions']}, {machine['date']}")


if __name__ == "__main__":
    arguments = parse_arguments()
    raise SystemExit(run_script("augmentation.py", lambda: run(arguments)))
