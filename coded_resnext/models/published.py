"""Published weights in and out: `net_list.3.conv_expand.weight` and the like.

The published code keeps the expand weight of a coded block as a grouped convolution,
`[N*C, D, 1, 1]`, branch-major; here it is dense, `[C, N*D, 1, 1]`. A network is described there by
an `architecture`: a list of blocks `[C_in, C, D, stride, "A/N", p_drop]` and layer names such as
`conv3_in3_out16`, `bn2D_in16`, `relu`, `avgPool8`, `flatten`, `linear_in96`. That of ImageNet has
no `p_drop`, and `avgPoolWithMean` instead of pooling and `flatten`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from coded_resnext.codebooks.codebook import Codebook

from .block import CodedBottleneck
from .resnext import CodedResNeXt, Stage

# Our names of a block's layers and the published ones.
_LAYERS = {
    "reduce": "conv_reduce",
    "reduce_bn": "bn_reduce",
    "grouped": "conv_internal",
    "grouped_bn": "bn_internal",
    "expand": "conv_expand",
    "expand_bn": "bn_expand",
    "skip.0": "skip_connection.conv_skip",
    "skip.1": "skip_connection.bn_skip",
}
_CODEWORDS = "Mask_perClass"
# The kinds of layers before and behind the blocks, by our names of the stems.
_LAYOUTS = {
    "conv3x3": (["conv3", "bn2D", "relu"], ["avgPool", "flatten", "linear"]),
    "conv7x7": (["conv7", "bn2D", "relu", "maxPool3"], ["avgPoolWithMean", "linear"]),
}


def published_block(
    state_dict: Mapping[str, Any],
    *,
    stride: int,
    drop_branches: float = 0.0,
    class_names: Sequence[str] | None = None,
) -> CodedBottleneck:
    """Returns a block with the weights that the published names hold, in their dtype.

    Args:
        state_dict: tensors (or arrays) under the published names of one block, `Mask_perClass`
            `[K, N]` among them; all ones there means a plain block.
        stride: of the 3x3 convolution, which no weight tells.
        drop_branches: DropSubNNs probability of the block.
        class_names: names of the K classes.

    Raises:
        ValueError: a tensor is missing, or a shape does not fit the others.
    """
    state = {name: torch.as_tensor(value) for name, value in state_dict.items()}
    mask = _take(state, _CODEWORDS)
    codebook = None if bool(mask.all()) else Codebook(mask, class_names)
    reduce, grouped = _take(state, "conv_reduce.weight"), _take(state, "conv_internal.weight")
    branches, width = mask.shape[1], grouped.shape[1]
    if grouped.shape[0] != branches * width:
        raise ValueError(
            f"conv_internal.weight: expected {branches} branches of width {width} as "
            f"{_CODEWORDS} and its second dimension say, got shape {list(grouped.shape)}"
        )
    block = CodedBottleneck(
        reduce.shape[1],
        len(_take(state, "bn_expand.weight")),
        width,
        branches,
        codebook,
        stride=stride,
        drop_branches=drop_branches,
    ).to(reduce.dtype)
    _load(block, _block_state(state, block), "")
    return block


def published_block_state(
    block: CodedBottleneck, *, num_classes: int | None = None
) -> dict[str, Tensor]:
    """Returns the weights of a block under the published names: the way back from
    `published_block`.

    Args:
        block: coded or plain; the ablations have no published counterpart.
        num_classes: `K`, needed for the all-ones mask of a plain block.

    Raises:
        ValueError: `num_classes` is missing for a plain block, or the block is an ablation.
    """
    if not block.normalize:
        raise ValueError("block: expected one with energy normalisation, got the ablation without")
    if block.is_coded and block.aggregation != "sum":
        raise ValueError("block: expected one that sums its branches, got aggregation='concat'")
    if block.codebook is not None:
        mask = block.codewords.clone()
    elif num_classes is None:
        raise ValueError("num_classes: expected the number of classes for a plain block, got None")
    else:
        mask = torch.ones(num_classes, block.branches, dtype=torch.bool)
    state = {_CODEWORDS: mask}
    for name, value in block.state_dict().items():
        if name == "codewords":
            continue
        layer, parameter = name.rsplit(".", 1)
        if name == "expand.weight" and block.is_coded:
            value = _to_grouped(value, block.branches)
        state[f"{_LAYERS[layer]}.{parameter}"] = value.clone()
    return state


def published_model(
    state_dict: Mapping[str, Any],
    architecture: Sequence[Any],
    *,
    class_names: Sequence[str] | None = None,
    drop_branches: float | None = None,
) -> CodedResNeXt:
    """Returns a network with the weights that the published names hold, in their dtype.

    Args:
        state_dict: tensors (or arrays) under the published names, `net_list.I.` before each.
        architecture: the published description of a network for CIFAR or for ImageNet, see the
            module. Our networks average over the whole map, whatever its size.
        drop_branches: DropSubNNs probability; None takes the largest of the blocks', or the
            published 0.1 where they have none.
        class_names: names of the K classes.

    Raises:
        ValueError: the architecture has a layer that our networks lack; or a tensor is missing, has
            a shape that does not fit, or belongs to none of the layers.
    """
    state = {name: torch.as_tensor(value) for name, value in state_dict.items()}
    stem, blocks, head = _parse(architecture)
    parts = {index: _below(state, f"net_list.{index}.") for index in blocks}
    books = {
        index: None
        if bool(_take(part, _CODEWORDS).all())
        else Codebook(part[_CODEWORDS], class_names)
        for index, part in parts.items()
    }
    groups = _group_blocks(blocks, architecture, books)
    if drop_branches is None:
        drop_branches = max((float(p) for i in blocks for p in architecture[i][5:]), default=0.1)
    head_weight = _take(state, f"net_list.{head}.weight")
    model = CodedResNeXt(
        [_stage(architecture, group) for group in groups],
        len(head_weight),
        codebooks=[book for group in groups if (book := books[group[0]]) is not None],
        class_names=class_names,
        stem=stem,  # type: ignore[arg-type]
        stem_channels=len(_take(state, "net_list.0.weight")),
        in_channels=_take(state, "net_list.0.weight").shape[1],
        drop_branches=drop_branches,
        head_bias=f"net_list.{head}.bias" in state,
    ).to(head_weight.dtype)
    unknown = sorted(state.keys() - published_model_state(model).keys())
    if unknown:
        raise ValueError(
            f"state_dict: expected tensors of the architecture alone, got {', '.join(unknown[:8])}"
        )
    for index, layer in ((0, model.stem[0]), (1, model.stem[1]), (head, model.head)):
        _load(layer, _below(state, f"net_list.{index}."), f"net_list.{index}.")
    for (index, part), block in zip(parts.items(), model.blocks, strict=True):
        _load(block, _block_state(part, block), f"net_list.{index}: ")
    return model


def published_model_state(model: CodedResNeXt) -> dict[str, Tensor]:
    """Returns the weights of a network under the published names: the way back from
    `published_model`."""
    blocks = model.blocks
    before, behind = _LAYOUTS[model.config["stem"]]
    parts: dict[int, dict[str, Tensor]] = {
        0: dict(model.stem[0].state_dict()),
        1: dict(model.stem[1].state_dict()),
        len(before) + len(blocks) + len(behind) - 1: dict(model.head.state_dict()),
    }
    for index, block in enumerate(blocks, len(before)):
        parts[index] = published_block_state(block, num_classes=model.num_classes)
    return {
        f"net_list.{index}.{name}": value.clone()
        for index, part in sorted(parts.items())
        for name, value in part.items()
    }


def _take(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"state_dict: expected a tensor {name!r}, got none of that name")
    return state[name]


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _to_grouped(dense: Tensor, branches: int) -> Tensor:
    """Returns `[C, N*D, 1, 1]` as `[N*C, D, 1, 1]`, branch-major."""
    channels = dense.shape[0]
    return dense.reshape(channels, branches, -1, 1, 1).transpose(0, 1).flatten(0, 1)


def _to_dense(grouped: Tensor, branches: int) -> Tensor:
    """Returns `[N*C, D, 1, 1]` as `[C, N*D, 1, 1]`."""
    if grouped.ndim != 4 or len(grouped) % branches:
        raise ValueError(
            f"conv_expand.weight: expected [{branches} * C, D, 1, 1], got {list(grouped.shape)}"
        )
    width = grouped.shape[1]
    return grouped.reshape(branches, -1, width, 1, 1).transpose(0, 1).flatten(1, 2)


def _block_state(state: Mapping[str, Tensor], block: CodedBottleneck) -> dict[str, Tensor]:
    """Returns our state dict of a block for the published one; `_load` checks the shapes."""
    ours = {}
    for name in block.state_dict():
        if name == "codewords":
            ours[name] = state[_CODEWORDS].bool()
            continue
        layer, parameter = name.rsplit(".", 1)
        published = f"{_LAYERS[layer]}.{parameter}"
        if parameter == "num_batches_tracked":
            ours[name] = state.get(published, torch.tensor(0))
        elif name == "expand.weight" and block.is_coded:
            ours[name] = _to_dense(_take(state, published), block.branches)
        else:
            ours[name] = _take(state, published)
    return ours


def _load(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads a layer, with the names and shapes that do not fit in the error."""
    own = module.state_dict()
    if "num_batches_tracked" in own:
        state.setdefault("num_batches_tracked", torch.tensor(0))
    wrong = [f"no {where}{name}" for name in own if name not in state]
    wrong += [
        f"{where}{name} is {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"state_dict: does not fit the layers: {'; '.join(wrong[:8])}")
    module.load_state_dict(state)


def _parse(architecture: Sequence[Any]) -> tuple[str, list[int], int]:
    """Returns stem kind, positions of the blocks and of the classifier."""
    blocks = [i for i, layer in enumerate(architecture) if not isinstance(layer, str)]
    if not blocks or blocks != list(range(blocks[0], blocks[-1] + 1)):
        raise ValueError("architecture: expected one uninterrupted run of blocks")
    before = [_kind(layer) for layer in architecture[: blocks[0]]]
    after = [_kind(layer) for layer in architecture[blocks[-1] + 1 :]]
    for stem, layout in _LAYOUTS.items():
        if layout == (before, after):
            return stem, blocks, len(architecture) - 1
    expected = " or ".join(f"{', '.join(a)}, blocks, {', '.join(b)}" for a, b in _LAYOUTS.values())
    raise ValueError(f"architecture: expected {expected}; got {before} and {after} around blocks")


def _kind(layer: str) -> str:
    """Returns `conv3` of `conv3_in3_out16`, `avgPool` of `avgPool8`."""
    return re.sub(r"^(avgPool)\d+$", r"\1", layer.partition("_")[0])


def _group_blocks(
    blocks: Sequence[int], architecture: Sequence[Any], books: Mapping[int, Codebook | None]
) -> list[list[int]]:
    """Returns the blocks of each stage: same sizes and codebook, stride 1 after the first."""
    groups = [[blocks[0]]]
    for before, index in pairwise(blocks):
        _, channels, width, stride, ratio = architecture[index][:5]
        same = [channels, width, ratio] == [architecture[before][i] for i in (1, 2, 4)]
        if same and stride == 1 and books[before] == books[index]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _stage(architecture: Sequence[Any], group: Sequence[int]) -> Stage:
    _, channels, width, stride, ratio = architecture[group[0]][:5]
    active, branches = map(int, ratio.split("/"))
    return Stage(len(group), channels, width, branches, active, stride)
