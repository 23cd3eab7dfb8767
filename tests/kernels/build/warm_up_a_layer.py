"""Warms up a coded layer under the stub driver, trains it a step, and prints what was compiled.

A process of its own, since it compiles.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
from torch import Tensor, nn

from coded_resnext import Codebook, warm_up
from coded_resnext.kernels import coded_aggregate, coding_loss, layout
from coded_resnext.kernels.build.steps import install_stub_driver
from coded_resnext.kernels.loss import functional as loss_functional
from coded_resnext.training import warm_up as room


class Layer(nn.Module):
    """The aggregate of ten branches of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 40, 1, 1))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        y, energies = coded_aggregate(h, self.weight, 10, backend="triton")
        return y, energies


def step(model: nn.Module, h: Tensor) -> Tensor:
    """A coding loss and whatever is behind the branch sum."""
    y, energies = model(h)
    targets = torch.zeros(len(h), dtype=torch.int64)
    return y.sum() + coding_loss(energies, codewords, targets, backend="triton")


if __name__ == "__main__":
    driver = install_stub_driver("sm90")
    # The operators are to take the way to the kernels, as on a GPU.
    for module in (layout, loss_functional):
        module.interpreted = lambda: True
    # Nothing runs, so that results are what the memory holds, and losses refuse what is not finite.
    Tensor.new_empty, torch.empty_like = Tensor.new_zeros, torch.zeros_like
    if "--build" in sys.argv:
        # Images are on a CPU here, and the kernels are built as for those on a GPU.
        build, room.backends, room.architecture = (
            room.build_kernels,
            lambda: {"triton": None},
            lambda _: "sm90",
        )
        room.build_kernels = lambda _: build(torch.device("cuda", 0))
    codewords = Codebook.shipped(10, 10, 5).codewords
    layer = Layer()
    h = torch.rand(5, 40, 4, 4).contiguous(memory_format=torch.channels_last)
    result = warm_up(layer, h, step)
    warmed = len(driver.launches)
    with room.watched() as asked:
        step(layer, h).backward()
    print(json.dumps({**asdict(result), "asked": asked, "launches": driver.launches[warmed:]}))
