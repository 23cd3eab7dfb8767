"""For cut-out networks: the registry's networks with weights that leave nothing at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coded_resnext import CodedResNeXt, create_model

# Small images, since equality does not depend on their size.
IMAGE_SIZES = {
    "coded_resnext_digits": 8,
    "coded_resnext29_10x11d": 8,
    "coded_resnext29_20x6d": 8,
    "coded_resnext50_32x4d": 32,
}


def make_random(name: str, seed: int = 0, **overrides: object) -> CodedResNeXt:
    """A network with random BatchNorm parameters and statistics, in evaluation mode."""
    torch.manual_seed(seed)
    model = create_model(name, **overrides)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def make_images(name: str, samples: int = 2) -> Tensor:
    """Random images for a network of the registry."""
    size = IMAGE_SIZES[name]
    channels = 1 if "digits" in name else 3
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, channels, size, size, generator=generator)
