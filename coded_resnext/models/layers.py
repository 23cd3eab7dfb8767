"""What the layers of a block are made as, and what has become of them since: the one place to ask.

Ways that read a layer's weight instead of calling it (the fused data flow, cutting out, folding,
counting) hold for the layers that a block is made with. People prune, dilate, wrap, hook and
replace layers; each of these ways asks here first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .grouped_conv import GroupedConv2d

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORM_NAMES = ("reduce_bn", "grouped_bn", "expand_bn")
# Settings of a norm, of the pooling and of a block that change results and no tensor.
DESCRIBED = ("eps", "ceil_mode", "normalize", "normalized_by", "aggregation")
# Settings of a convolution that its sizes tell.
SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("padding_mode", "groups"),
)
# Hooks that make a weight of other tensors just before the layer is called.
WEIGHT_MAKERS = (BasePruningMethod, SpectralNorm, WeightNorm)


class PixelPicker(nn.Conv2d):
    """A 1x1 convolution that first takes the pixels that its stride reads.

    Without a stride it is faster on these than with one on all pixels.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Maps `[B, C_in, H_in, W_in]` to `[B, C, H, W]`."""
        down, right = self.stride
        return F.conv2d(input[:, :, ::down, ::right], self.weight, self.bias)


class StemReLU(nn.ReLU):
    """A ReLU in place, which spares a large map, but where hooks made a view of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to the same shape."""
        traced = isinstance(input, fx.Proxy) or torch.compiler.is_compiling()
        return F.relu(input, inplace=not traced and not input._is_view())


CONVOLUTIONS = (nn.Conv2d, GroupedConv2d, PixelPicker)


def made_as(module: nn.Module) -> type:
    """Returns the type of a module, for a parametrized one that which it had before."""
    return parametrize.type_before_parametrizations(module)


def applied_weight(layer: Any, in_channels: int, groups: int, like: Tensor) -> Tensor:
    """Returns the weight `[C, I / groups, 1, 1]` that a linear 1x1 layer applies.

    It is a convolution's own; pruning and the like make it here, as they do before each call. Of
    any other layer, such as a convolution within an adapter, it is what it does to unit vectors.

    Args:
        layer: maps `[B, I, H, W]` to `[B, C, H, W]`.
        in_channels: `I`.
        groups: of the convolution that the layer stands for.
        like: whose dtype and device its input has.
    """
    if made_as(layer) in CONVOLUTIONS and "forward" not in vars(layer):
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WEIGHT_MAKERS):
                hook(layer, None)
        weight: Tensor = layer.weight
        return weight
    unit = torch.eye(in_channels // groups, dtype=like.dtype, device=like.device)
    unit = unit.repeat(1, groups)[:, :, None, None]
    response: Tensor = layer(unit) - layer(torch.zeros_like(unit))
    return response.transpose(0, 1)


def copy_of(network: ModuleT) -> ModuleT:
    """Returns a copy, also of layers whose weight is made of other tensors before each call.

    What pruning, weight norm and the like have made is no parameter, which PyTorch would not copy.
    """
    made = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(network, made)


def is_seen_by_calls(layer: nn.Module) -> bool:
    """Returns whether a tool takes gradients of single samples by hooks, as Opacus does.

    It sets `grad_sample`, and sees of a weight what passes through calls of its layer.
    """
    return any(hasattr(parameter, "grad_sample") for parameter in layer.parameters())


def unusual_layer(block: Any, *, sizes_only: bool = False) -> str | None:
    """Returns which layer of a block is not as it was made, and how; None if all are.

    Args:
        block: a `CodedBottleneck`, whole or cut out.
        sizes_only: whether only what tells the sizes and the work of a layer matters: its type and
            settings, not hooks, nor whence its weight comes.
    """
    wide = block.branches * block.width
    concatenated = block.is_coded and block.aggregation == "concat"
    groups = block.branches if concatenated else 1
    stride, channels = block.stride, block.channels
    convolutions = {
        "reduce": (block.in_channels, wide, 1, 1, 1),
        "grouped": (wide, wide, 3, stride, block.branches),
        "expand": (wide, channels, 1, 1, groups),
    }
    layers: list[tuple[str, Any, tuple[Any, ...] | None]] = []
    # Attributes of a module are looked for elsewhere first, at every call of a block.
    own = block._modules
    for name, of in convolutions.items():
        layers += ((name, own[name], of), (f"{name}_bn", own[f"{name}_bn"], None))
    if type(block.skip) is nn.Sequential:
        first, *second = block.skip
        thin = second and made_as(second[0]) in CONVOLUTIONS
        rank = getattr(first, "out_channels", channels) if thin else channels
        layers.append(("skip.0", first, (block.in_channels, rank, 1, stride, 1)))
        behind = (rank, channels, 1, 1, 1) if thin else None
        layers += [(f"skip.{i}", layer, behind) for i, layer in enumerate(second, 1)]
    elif type(block.skip) is not nn.Identity or stride != 1 or block.in_channels != channels:
        return f"skip: {_instead(block.skip, 'the skip connection')}"
    weights = (getattr(layer, "weight", None) for _, layer, sizes in layers if sizes)
    dtypes = {weight.dtype for weight in weights if weight is not None}
    for name, layer, sizes in layers:
        reason = _norm(layer) if sizes is None else _convolution(layer, *sizes)
        if reason is None and not sizes_only:
            reason = _acted_on(layer) or _mixed(layer, dtypes)
        if reason is not None:
            return _named(name, reason)
    if sizes_only:
        return None
    if block.is_coded and block.form is None and isinstance(block.expand_bn, nn.Identity):
        return _named("expand_bn", _instead(block.expand_bn, "BatchNorm"))
    return _named("forward", _acted_on(block)) or _named("skip", _acted_on(block.skip))


def folded_away(block: Any) -> str | None:
    """Returns which BatchNorm of a block was folded into the convolution before it, if one was."""
    names = (name for name in NORM_NAMES if isinstance(getattr(block, name), nn.Identity))
    return next((_named(name, _instead(nn.Identity(), "BatchNorm")) for name in names), None)


def check_layers(network: Any, purpose: str, *, sizes_only: bool = False) -> None:
    """Raises ValueError, naming the first layer of a network that is not as it was made.

    Args:
        network: a `CodedResNeXt` or a network that was cut out; its classifier may be missing where
            only sizes matter.
        purpose: what reads the layers, for the message.
        sizes_only: as for `unusual_layer`.
    """
    for reason in filter(None, _unusual(network, sizes_only)):
        raise ValueError(f"{reason}; {purpose}")


def check_settings(network: nn.Module, described: nn.Module, purpose: str) -> None:
    """Raises ValueError, naming the first layer with a setting that its description does not have.

    Args:
        network: of which layers may have been changed since it was made.
        described: the network that the same description makes.
        purpose: what is made by the description, for the message.
    """
    for name, usual in described.named_modules():
        layer = network.get_submodule(name)
        for setting in DESCRIBED:
            expected = getattr(usual, setting, None)
            value = getattr(layer, setting, None)
            if value != expected:
                raise ValueError(f"{name}: {setting}: expected {expected}, got {value}; {purpose}")


def _unusual(network: Any, sizes_only: bool) -> Iterator[str | None]:
    config = network.config if isinstance(network.config, dict) else vars(network.config)
    small = config["stem"] == "conv3x3"
    conv, *others = network.stem
    sizes = (config["in_channels"], config["stem_channels"], *((3, 1) if small else (7, 2)), 1)
    yield _named("stem.0", _convolution(conv, *sizes))
    for index, layer in enumerate(others, 1):
        usual = type(layer) in (nn.ReLU, StemReLU, nn.MaxPool2d)
        yield None if usual else _named(f"stem.{index}", _norm(layer))
    if not sizes_only:
        yield from (_named("stem", _acted_on(layer)) for layer in (network.stem, *network.stem))
    names = {id(module): name for name, module in network.named_modules()}
    for block in network.blocks:
        name = names[id(block)]
        if not hasattr(block, "unusual_layer"):
            yield _named(name, _instead(block, "a block"))
            return
        reason = block.unusual_layer(sizes_only=sizes_only)
        if isinstance(network.config, dict) and not sizes_only:
            reason = reason or folded_away(block)
        yield reason and f"{name}.{reason}"
    if not sizes_only:
        head, channels = network.head, network.blocks[-1].channels
        usual = type(head) is nn.Linear and head.in_features == channels
        yield _named("head", _acted_on(head) if usual else _instead(head, "the classifier"))


def _named(name: str, reason: str | None) -> str | None:
    return reason and f"{name}: {reason}"


def _instead(module: nn.Module, usual: str) -> str:
    return f"{type(module).__name__} stands in the place of {usual}"


def _convolution(
    conv: Any, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int
) -> str | None:
    """Returns how a layer differs from the convolution of these sizes that keeps the map's size."""
    usual = type(conv) in CONVOLUTIONS or made_as(conv) in CONVOLUTIONS
    if not usual or "forward" in vars(conv):
        return _instead(conv, "a convolution")
    spread = kernel > 1
    actual = (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding if conv.padding != "same" else (kernel // 2,) * 2,
        # A 1x1 kernel has nothing to spread or to pad.
        conv.dilation if spread else (1, 1),
        conv.padding_mode if spread else "zeros",
        conv.groups,
    )
    sides = ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2)
    expected = (in_channels, out_channels, *sides, (1, 1), "zeros", groups)
    if actual == expected:
        return None
    settings = zip(SETTINGS, actual, expected, strict=True)
    name, value, wanted = next(each for each in settings if each[1] != each[2])
    return f"{name}: expected {wanted}, got {value}"


def _norm(layer: nn.Module) -> str | None:
    """Returns how a layer differs from a BatchNorm, or from one that was folded away."""
    usual = type(layer) in (*NORMS, nn.Identity) and "forward" not in vars(layer)
    return None if usual else _instead(layer, "BatchNorm")


def _acted_on(module: nn.Module) -> str | None:
    """Returns what acts when a module is called, besides its forward pass."""
    if "forward" in vars(module):
        return "its forward pass was replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "there is a hook on the output or the input of a layer"
    if module._backward_hooks or module._backward_pre_hooks:
        return "there is a hook on the gradient of a layer"
    made = vars(module).get("weight") is not None or "weight" in module._buffers
    if made or "parametrizations" in module._modules:
        return "its weight is made of other tensors"
    return None


def _mixed(layer: Any, dtypes: set[torch.dtype]) -> str | None:
    weight = layer._parameters.get("weight")
    usual = weight is None or (len(dtypes) == 1 and weight.dtype in (*dtypes, torch.float32))
    return None if usual else f"dtype: expected one for all convolutions, got {weight.dtype}"
