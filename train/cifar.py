"""Train a Coded ResNeXt on CIFAR-10 or CIFAR-100, as published, and evaluate it.

python train/cifar.py --config cifar10 --out runs/cifar10
torchrun --nproc_per_node=8 train/cifar.py --config cifar100 --workers 2
python train/cifar.py --config cifar10_small --seed 1 --model resnext17_10x4d
"""

from __future__ import annotations

import sys
from pathlib import Path

from coded_resnext.recipe import parse_command
from coded_resnext.run_recipe import run_recipe

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    """Run the recipe that the command line names."""
    run_recipe(parse_command(None, description=__doc__ or "", recipes=RECIPES, default="cifar10"))


if __name__ == "__main__":
    sys.exit(main())
