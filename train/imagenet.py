"""Train a Coded ResNeXt on ImageNet at 160 pixels, as published, and evaluate it.

Source, expected accuracy, cost and command stand in the recipes: imagenet (of the talk, 250 epochs)
and imagenet_150 (of the paper). The data are IMAGENET/{train,val}/CLASS/*.

    torchrun --nproc_per_node=8 train/imagenet.py --data-dir IMAGENET --amp --out runs/imagenet
"""

import sys

from coded_resnext.cli.main import train_by_recipe

if __name__ == "__main__":
    sys.exit(train_by_recipe(__file__, __doc__, default="imagenet"))
