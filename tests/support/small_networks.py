"""For the experiments: a small network whose branches matter, its data, and one that is told."""

from __future__ import annotations

import torch
from support.helpers import class_margins
from torch import Tensor, nn

from coded_resnext import Codebook, CodedResNeXt, Stage
from coded_resnext.data.batches import Batches, batches

NAMES = ["ant", "bee", "cat", "dog"]
WIDE = Codebook.from_words(["11100", "01110", "00111", "10011"], NAMES)
NARROW = Codebook.from_words(["1100", "0110", "0011", "1001"], NAMES)


def make_network(**arguments: object) -> CodedResNeXt:
    """Plain, coded, plain and coded stages with weights that leave nothing at zero."""
    torch.manual_seed(0)
    stages = [Stage(1, 12, 2, 5, 5), Stage(2, 12, 2, 5, 3), Stage(1, 16, 2, 4, 4, stride=2)]
    model = CodedResNeXt(
        [*stages, Stage(1, 16, 2, 4, 2)],
        4,
        codebooks=[WIDE, NARROW],
        stem_channels=8,
        in_channels=1,
        head_bias=True,
        **arguments,
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    model.eval()
    # A random network favours one class for all images; without its mean logits all occur.
    with torch.no_grad():
        model.head.bias.zero_()
        model.head.bias -= model(make_images(200, seed=0)).mean(0)
    return model


def make_images(samples: int, seed: int) -> Tensor:
    """Noise of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.randn(samples, 1, 1, 1, generator=generator)
    return brightness + torch.randn(samples, 1, 6, 6, generator=generator)


def make_data(model: CodedResNeXt, samples: int, seed: int) -> Batches:
    """Images whose targets are what the network says, but for every fifth."""
    images = make_images(samples, seed)
    with torch.no_grad():
        logits = model(images)
    targets = logits.argmax(1)
    # Tests compare decisions, of which none may hang on rounding: some 1e-7 of the logits.
    assert float(class_margins(logits).min()) > 1e-5
    targets[::5] = (targets[::5] + 1) % 4
    return batches(images, targets, 16)


class ToldNetwork(CodedResNeXt):
    """Says what the images tell it: class and energies are written into their pixels."""

    def __init__(self) -> None:
        super().__init__(
            [Stage(1, 8, 1, 4, 2), Stage(1, 8, 1, 4, 2)], 4, codebooks=[NARROW, NARROW]
        )

    def features(self, x: Tensor, *_: object, **__: object) -> tuple[Tensor, list[Tensor]]:
        """Pixel row 0 holds the logits, rows 1 and 2 the energies of the blocks."""
        return x, [x[:, 0, 1], x[:, 0, 2]]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Reads the logits."""
        return x[:, 0, 0]


def tell(said: int, first: list[float], second: list[float]) -> Tensor:
    """An image that makes the network say a class and show normalised energies."""
    logits = [float(index == said) for index in range(4)]
    return torch.tensor([[logits, first, second]])
