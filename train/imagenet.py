"""Train a Coded ResNeXt on ImageNet at 160 pixels, as published, and evaluate it.

Source, expected accuracy, cost and command stand in the recipes: imagenet (of the talk, 250 epochs)
and imagenet_150 (of the paper). The data are IMAGENET/{train,val}/CLASS/*.

    torchrun --nproc_per_node=8 train/imagenet.py --data-dir IMAGENET --amp --out runs/imagenet
"""

import sys

from coded_resnext.cli.train import main

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, default="imagenet"))
