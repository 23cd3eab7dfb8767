"""The launch settings that training the paper's networks needs: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from coded_resnext.kernels.batch_norm import rows as batch_norm_rows
from coded_resnext.kernels.coded.rows import (
    aggregate_backward,
    aggregate_forward,
    energy_backward,
    energy_forward,
    weighted_gram,
)
from coded_resnext.kernels.conv3x3 import rows as conv3x3_rows
from coded_resnext.kernels.loss.rows import LossSizes, coding_loss
from coded_resnext.kernels.recompute import rows as recompute_rows
from coded_resnext.kernels.residual import rows as residual_rows
from coded_resnext.kernels.rows import CodedSizes, Dtype, LaunchRow, Variant

# Outputs of the expand convolution's input in the paper's networks, coded stages only: the map
# sizes are those of 32-pixel CIFAR images and of ImageNet at 160 and 224 pixels.
PAPER_SIZES = {
    "20x6d c3": CodedSizes(20, 12, 512, 256),
    "20x6d c4": CodedSizes(20, 24, 1024, 64),
    "10x11d c3": CodedSizes(10, 22, 512, 256),
    "10x11d c4": CodedSizes(10, 44, 1024, 64),
    "32x4d c4 160px": CodedSizes(32, 16, 1024, 100),
    "32x4d c5 160px": CodedSizes(32, 32, 2048, 25),
    "32x4d c4 224px": CodedSizes(32, 16, 1024, 196),
    "32x4d c5 224px": CodedSizes(32, 32, 2048, 49),
}

RowMaker = Callable[[CodedSizes, Variant], LaunchRow]
ROW_MAKERS: tuple[RowMaker, ...] = (
    energy_forward,
    energy_backward,
    weighted_gram,
    aggregate_forward,
    aggregate_backward,
)


def shipped_rows(arch: str) -> Iterator[tuple[str, LaunchRow]]:
    """Yields every row that training the paper's networks launches, each with a name of its own.

    Training draws a DropSubNNs mask and removes no branches; the affine map of BatchNorm is applied
    by PyTorch. Fused blocks have rows in bfloat16, for training and for evaluation.
    """
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
    for stage, sizes in PAPER_SIZES.items():
        for dtype in dtypes:
            for make in ROW_MAKERS:
                row = make(sizes, Variant(dtype, drop=True, arch=arch))
                yield f"{row.kernel.split(':')[1]} {stage} {dtype}", row
    for branches, classes in ((10, 10), (20, 100), (32, 1000)):
        for soft in (False, True):
            sizes_of_loss = LossSizes(branches, classes, soft)
            yield f"coding_loss {branches} of {classes} soft={soft}", coding_loss(sizes_of_loss)
    yield from conv3x3_rows.shipped_rows(arch)
    yield from recompute_rows.shipped_rows(arch)
    yield from residual_rows.shipped_rows()
    yield from batch_norm_rows.shipped_rows()
