"""The 1x1 convolutions and the ends of blocks past 2^31 elements, in memory full of holes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.holes import Holes
from torch import Tensor
from triton.runtime import interpreter

from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.conv1x1.rows import ProductSizes
from coded_resnext.kernels.layout import interpreted
from coded_resnext.kernels.recompute import rows as recompute_rows
from coded_resnext.kernels.residual import rows as residual_rows
from coded_resnext.kernels.rows import LaunchRow, Variant

WIDE, NARROW = 2048, 16
SIZES = ProductSizes(WIDE, NARROW)
VARIANT = Variant("fp16", affine=True, statistics=True, gain=True, output_gradient=True, arch="cpu")
DTYPES = {"*fp16": torch.float16, "*fp32": torch.float32, "*u8": torch.uint8}

ROWS = {
    "product_forward": conv1x1_rows.forward(SIZES, VARIANT),
    "join_forward": conv1x1_rows.join_forward(SIZES, VARIANT),
    "product_input_gradient": conv1x1_rows.input_gradient(SIZES, VARIANT),
    "join_input_gradient": conv1x1_rows.join_input_gradient(SIZES, VARIANT),
    "product_weight_gradient": conv1x1_rows.weight_gradient(SIZES, VARIANT),
    "product_join": recompute_rows.product_join(
        SIZES, replace(VARIANT, residual=True, factor=True, scaled=True, mapped=True, signs=True)
    ),
    "moments_input_gradient": recompute_rows.moments_gradient(ProductSizes(NARROW, WIDE), VARIANT),
    "pointwise_join": residual_rows.pointwise_join(WIDE, "fp16", mapped=True, factor=True),
    "pointwise_join_backward": residual_rows.pointwise_join_backward(WIDE, "fp16", mapped=True),
    "column_statistics": residual_rows.column_statistics(WIDE, "fp16"),
}
# What a part of the work has of every tensor, those that it writes in front of the semicolon: `x`
# and `y` are maps of the input's and the output's channels, a number and a letter so many vectors,
# `w` a weight, `s` the signs of a `y`, `p` a number, a part being a sample; `-` is shared by all
# parts, or absent.
TENSORS = {
    "product_forward": "y 3y ; x - - -",
    "join_forward": "x - y 3y ; x - - x - - -",
    "product_input_gradient": "x y 2x ; y y - - - x - - -",
    "join_input_gradient": "x y 3x ; y y - - - x x - x x -",
    "product_weight_gradient": "w ; y x - -",
    "product_join": "y s ; x - - - - - y - - p",
    "moments_input_gradient": "y 2y ; x - - - - y - -",
    "pointwise_join": "x ; x - - x - - p",
    "pointwise_join_backward": "x 3x ; x x x x",
    "column_statistics": "3x ; x",
}


def pixels_of(row: LaunchRow) -> int:
    """Of a part."""
    sizes = dict(row.constexprs)
    if "TRIPS" in sizes:
        return int(sizes["TRIPS"]) * int(sizes["BLOCK_P"])
    return int(sizes["BLOCK_K" if "weight" in row.kernel else "BLOCK_M"])


def programs_of(row: LaunchRow) -> int:
    """Programs of a part: one for each block of channels that it writes."""
    sizes = dict(row.constexprs)
    if "TRIPS" in sizes:
        return -(-WIDE // int(sizes["BLOCK_C"]))
    channels = sizes["INPUTS" if "gradient" in row.kernel else "OUTPUTS"]
    return -(-int(channels) // int(sizes["BLOCK_N"]))


def elements_of(word: str, pixels: int) -> int:
    """Of a part, in the tensor that a word stands for."""
    if word in ("w", "p"):
        return WIDE * NARROW if word == "w" else 1
    channels = {"x": WIDE, "y": NARROW, "s": NARROW // 8}[word[-1]]
    return channels * (int(word[:-1]) if word[:-1] else pixels)


@pytest.mark.parametrize("kernel", TENSORS)
def test_the_last_part_does_what_the_first_does(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers lie 2^31 elements further on, and so do the results."""
    assert interpreted(), "set TRITON_INTERPRET=1 before the first kernel is imported"
    row, words = ROWS[kernel], TENSORS[kernel].replace(";", "").split()
    writes = TENSORS[kernel].split().index(";")
    pixels, programs = pixels_of(row), programs_of(row)
    counts = [0 if word == "-" else elements_of(word, pixels) for word in words]
    # Vectors of a part are no more than the GPU holds programs.
    last = 2**31 // min(elements_of(word, pixels) for word in words if word in ("w", "x", "y"))
    types = [word if isinstance(word, str) else None for word in row.args[: len(words)]]
    memories = [
        Holes((last + 1) * count, DTYPES[word]) if count and word else None
        for count, word in zip(counts, types, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    shared = [
        torch.rand(WIDE * NARROW, generator=generator).to(DTYPES[word]) if word else None
        for word in types
    ]
    builder = interpreter.interpreter_builder
    results: list[list[Tensor]] = []
    for part in (0, last):
        generator.manual_seed(1)
        args = list(shared)
        for n, (memory, count) in enumerate(zip(memories, counts, strict=True)):
            if memory is not None:
                # The factor of a sample is above 0: the ReLU behind it must leave something.
                values = torch.rand(count, generator=generator) - (words[n] != "p") / 2
                memory.at(part * count, count)[:] = values.to(memory.dtype)
                args[n] = memory.at(0)
        with monkeypatch.context() as patch:
            patch.setattr(
                builder,
                "set_grid_idx",
                lambda x, y, z, part=part: setattr(
                    builder, "grid_idx", (part * programs + x, y, z)
                ),
            )
            sizes = ((part + 1) * pixels, pixels)[: len(row.args) - len(words)]
            row.launch((programs,), *args, *sizes)
        results.append(
            [
                memory.at(part * count, count).clone()
                for memory, count in zip(memories[:writes], counts, strict=False)
                if memory is not None
            ]
        )
    for first, other in zip(*results, strict=True):
        assert first.isfinite().all()
        assert first.count_nonzero() > len(first) // 4
        # The interpreter runs the same steps on the same numbers.
        assert torch.equal(first, other)
