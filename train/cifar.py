"""Train a Coded ResNeXt on CIFAR-10 or CIFAR-100, as published, and evaluate it.

Source, expected accuracy, cost and command stand in the recipes: cifar10, cifar100,
cifar10_cpu, cifar10_small.

    python train/cifar.py --config cifar10 --out runs/cifar10
    torchrun --nproc_per_node=8 train/cifar.py --config cifar100
    python train/cifar.py --config cifar10_small --model resnext17_10x4d --seed 1
"""

import sys

from coded_resnext.cli.main import train_by_recipe

if __name__ == "__main__":
    sys.exit(train_by_recipe(__file__, __doc__, default="cifar10"))
