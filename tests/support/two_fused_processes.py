"""What two processes do in the tests of the fused data flow; started by their tests.

    python tests/support/two_fused_processes.py FOLDER

writes what each process found into the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.small_networks import make_images, make_network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coded_resnext import CodedResNeXt

BATCH = 6


def network() -> CodedResNeXt:
    """In the fused data flow, in float64."""
    model = make_network(drop_branches=0.0).double()
    for block in model.blocks:
        block.backend = "fused"
    return model.train()


def synchronised(model: CodedResNeXt) -> CodedResNeXt:
    """With SyncBatchNorm in the blocks; PyTorch's own, which the stem would run, needs a GPU."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model.stages)
    return model


def step(model: CodedResNeXt, call: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gradients and buffers after a step; each sample's loss depends on all of its batch."""
    model.stem[1].eval()
    logits, energies = call(images, return_energies=True)
    total = logits.square().sum(1) + sum(each.pow(3).sum(1) for each in energies)
    total.mean().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return actual | dict(model.named_buffers())


def run(rank: int, folder: str) -> None:
    """One of the two processes: half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = network()
    # It refuses SyncBatchNorm on a CPU, whoever runs it, so that this comes second.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    synchronised(model)
    images = make_images(BATCH, seed=4).double()[rank::2]
    actual = step(model, parallel, images)
    torch.save(actual, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
