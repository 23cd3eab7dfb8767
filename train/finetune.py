"""Train a coded network on a folder of images: from trained weights, or from scratch.

The data are FOLDER/train/CLASS/* with FOLDER/test or FOLDER/val; the codebooks are made for its
classes. Weights are a run of this library, or the state dict of a plain ResNeXt of timm or
torchvision. The recipes are finetune and, for a small network from scratch, folder.

    python train/finetune.py --data-dir FOLDER --initial-checkpoint WEIGHTS --out runs/finetune
    python train/finetune.py --config folder --data-dir FOLDER --out runs/folder
"""

import sys

from coded_resnext.cli.main import train_by_recipe

if __name__ == "__main__":
    sys.exit(train_by_recipe(__file__, __doc__, default="finetune"))
