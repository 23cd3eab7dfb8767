"""A network for ImageNet as the published code lays it out, by its rules and not by ours."""

from __future__ import annotations

from typing import Any

import torch

from coded_resnext import Codebook


def imagenet_layout(
    depths: list[int], ratios: list[str], size: int, classes: int
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The published description of a network for ImageNet, and a state dict by its rules.

    By the rules of the published code, not by ours: a block says its channels in and out, its
    width, its stride and its ratio, and no probability; pooling is one layer, so that the
    classifier of the published network is number 21; branches stand below one another in
    `conv_expand`; a plain block has a mask of ones. Channels are `size` times those of a network
    of `size` 1; the published one has 64.
    """
    architecture: list[Any] = [f"conv7_in3_out{size}_str2", f"bn2D_in{size}", "relu"]
    architecture.append("maxPool3_str2_pad1")
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def norm(name: str, channels: int) -> dict[str, torch.Tensor]:
        tensors = {f"{name}.{kind}": drawn(channels) for kind in ("weight", "bias")}
        tensors |= {f"{name}.running_{kind}": drawn(channels) for kind in ("mean", "var")}
        return {**tensors, f"{name}.num_batches_tracked": torch.tensor(7)}

    state = {"net_list.0.weight": drawn(size, 3, 7, 7), **norm("net_list.1", size)}
    channels = size
    for stage, (depth, ratio) in enumerate(zip(depths, ratios, strict=True)):
        active, branches = map(int, ratio.split("/"))
        width, out = (size // 16) << stage, (4 * size) << stage
        mask = torch.ones(classes, branches, dtype=torch.bool)
        if active < branches:
            mask = Codebook.shipped(classes, branches, active, "paper").codewords
        for index in range(depth):
            stride = 2 if stage and not index else 1
            name = f"net_list.{len(architecture)}."
            wide = branches * width
            expand = (branches * out, width) if active < branches else (out, wide)
            state |= {
                f"{name}Mask_perClass": mask,
                f"{name}conv_reduce.weight": drawn(wide, channels, 1, 1),
                **norm(f"{name}bn_reduce", wide),
                f"{name}conv_internal.weight": drawn(wide, width, 3, 3),
                **norm(f"{name}bn_internal", wide),
                f"{name}conv_expand.weight": drawn(*expand, 1, 1),
                **norm(f"{name}bn_expand", out),
            }
            if index == 0:
                skip = f"{name}skip_connection."
                state |= {f"{skip}conv_skip.weight": drawn(out, channels, 1, 1)}
                state |= norm(f"{skip}bn_skip", out)
            architecture.append([channels, out, width, stride, ratio])
            channels = out
    architecture += ["avgPoolWithMean", f"linear_in{channels}"]
    state[f"net_list.{len(architecture) - 1}.weight"] = drawn(classes, channels)
    return architecture, state
