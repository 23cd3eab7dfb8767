"""Run outside the checkout against an installed wheel: it imports from there and predicts, with
shipped weights too.

`python wheel_predicts.py FOLDER`, FOLDER being where the wheel was installed.
"""

import sys
from pathlib import Path

import torch

import coded_resnext
from coded_resnext import kernels

folder = Path(sys.argv[1]).resolve()
for module in (coded_resnext, kernels):
    location = Path(str(module.__file__)).resolve()
    if folder not in location.parents:
        sys.exit(f"{module.__name__} came from {location}, not from the wheel in {folder}")
model = coded_resnext.create_model("coded_resnext29_10x11d").eval()
logits, energies = model(torch.zeros(2, 3, 32, 32), return_energies=True)
if logits.shape != (2, 10) or len(energies) != 6 or not logits.isfinite().all():
    sys.exit("the network of the wheel does not predict")
for network in coded_resnext.list_models(pretrained=True):
    trained = coded_resnext.create_model(network, pretrained=True).eval()
    size = trained.image_size
    if not trained(torch.zeros(2, trained.in_channels, size, size)).isfinite().all():
        sys.exit(f"the wheel's weights of {network} do not predict")
print(f"the wheel's network predicts: {coded_resnext.__file__}")
