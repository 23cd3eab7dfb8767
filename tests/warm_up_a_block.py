"""Warms up a coded block under the stub driver, trains it a step, and prints what was compiled.

A process of its own, since it compiles: `python warm_up_a_block.py SIZE`, for `SIZE x SIZE` maps.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
from coded_resnext.kernels import launch, loss_operator
from coded_resnext.kernels.stub_driver import install_stub_driver
from torch import Tensor, nn

from coded_resnext import Codebook, CodedBottleneck, CodedLoss, warm_up
from coded_resnext.warm_up import watched

if __name__ == "__main__":
    driver = install_stub_driver("sm90")
    # The operators are to take the way to the kernels, as on a GPU.
    for module in (launch, loss_operator):
        module.interpreted = lambda: True
    # Nothing runs, so that results are what the memory holds, and losses refuse what is not finite.
    Tensor.new_empty, torch.empty_like = Tensor.new_zeros, torch.zeros_like
    book = Codebook.shipped(10, 10, 5)
    block = CodedBottleneck(16, 32, 4, 10, book, drop_branches=0.1, backend="triton")
    criterion = CodedLoss([book], backend="triton")

    def step(model: nn.Module, images: Tensor) -> Tensor:
        y, energies = model(images)
        targets = torch.zeros(len(images), dtype=torch.int64)
        return criterion(y.mean((2, 3))[:, :10], [energies], targets).total

    size = int(sys.argv[1])
    images = torch.rand(5, 16, size, size).contiguous(memory_format=torch.channels_last)
    result = warm_up(block, images, step)
    warmed = len(driver.launches)
    with watched() as asked:
        step(block, images).backward()
    print(json.dumps({**asdict(result), "asked": asked, "launches": driver.launches[warmed:]}))
