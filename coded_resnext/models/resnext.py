"""The Coded ResNeXt network. Its named configurations are in models/registry.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor, fx, nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.codebooks.files import Size, shipped_sizes
from coded_resnext.kernels import Aggregation, Backend
from coded_resnext.kernels.checks import check_integers, check_items, check_kind, typed

from .block import CodedBottleneck, Step, check_images, classify, features, walk
from .layers import StemReLU, check_layers, check_settings

fx.wrap("check_images")
fx.wrap("check_untraced")

Stem = Literal["conv3x3", "conv7x7"]
Keep = int | Tensor | Sequence[Tensor | None]


class CodedResNeXt(nn.Module):
    """ResNeXt whose later stages assign their branches to classes.

    With `A = N` in every stage this is plain ResNeXt. The forward pass needs no labels.

    Args:
        stages: the stages, first to last.
        num_classes: number of classes `K`.
        codebooks: one for each coded stage, in order. Left out, each stage takes the codebook
            shipped for its (K, N, A), or the one that a seeded search finds.
        class_names: names of the classes in the order of the logits. Left out, those of the
            codebooks.
        stem: `"conv3x3"` (stride 1, for small images), or `"conv7x7"` (stride 2, then 3x3
            max-pooling of stride 2).
        stem_channels: channels behind the stem.
        in_channels: channels of the images.
        drop_branches: DropSubNNs probability of the coded blocks, `0 <= p < 1`.
        share_masks: whether consecutive blocks of a codebook drop the same branches; False is an
            ablation.
        head_bias: whether the classifier has a bias; the published one has none.
        aggregation: `"sum"`, or `"concat"`, the ablation of the paper's talk.
        normalize: whether coded blocks normalise energies; False is an ablation.
        backend: implementation of the coded operation, see `coded_resnext.kernels`.
        image_size: height and width, in pixels, of the images that the network is made for; others
            work too. Left out, 32, or 224 with the stem for large images.

    Raises:
        ValueError: an argument is outside its range, or a codebook does not fit its stage, the
            classes, or the other codebooks.

    Attributes:
        codebooks: the codebook of every coded *block*, in the order of the returned energies.
        config: JSON-ready arguments that, with the codebooks, rebuild the network.
    """

    @typed
    def __init__(
        self,
        stages: Sequence[Stage],
        num_classes: int,
        *,
        codebooks: Sequence[Codebook] | None = None,
        class_names: Sequence[str] | None = None,
        stem: Stem = "conv3x3",
        stem_channels: int = 64,
        in_channels: int = 3,
        drop_branches: float = 0.1,
        share_masks: bool = True,
        head_bias: bool = False,
        aggregation: Aggregation = "sum",
        normalize: bool = True,
        backend: Backend = "auto",
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        check_items("stages", stages, Stage)
        if not stages:
            raise ValueError("stages: expected at least one stage, got none")
        check_integers(2, num_classes=num_classes)
        if stem not in get_args(Stem):
            raise ValueError(f"stem: expected 'conv3x3' or 'conv7x7', got {stem!r}")
        check_integers(stem_channels=stem_channels, in_channels=in_channels)
        if image_size is not None:
            check_integers(image_size=image_size)
        self.image_size = image_size or usual_image_size(stem)
        stage_codebooks = assign_codebooks(stages, num_classes, codebooks, class_names)
        self.class_names = check_class_names(stage_codebooks, num_classes, class_names)
        self.stage_codebooks = tuple(book for book in stage_codebooks if book is not None)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.config: dict[str, Any] = {
            "stages": [asdict(stage) for stage in stages],
            "num_classes": num_classes,
            "stem": stem,
            "stem_channels": stem_channels,
            "in_channels": in_channels,
            "drop_branches": drop_branches,
            "head_bias": head_bias,
            "aggregation": aggregation,
            "normalize": normalize,
            **({} if image_size is None else {"image_size": image_size}),
            **({} if share_masks else {"share_masks": False}),
        }

        self.stem = make_stem(stem, in_channels, stem_channels)
        self.stages = nn.ModuleList()
        channels = stem_channels
        for stage, codebook in zip(stages, stage_codebooks, strict=True):
            blocks = nn.ModuleList()
            for index in range(stage.depth):
                blocks.append(
                    CodedBottleneck(
                        channels,
                        stage.channels,
                        stage.width,
                        stage.branches,
                        codebook,
                        stride=stage.stride if index == 0 else 1,
                        drop_branches=drop_branches,
                        share_masks=share_masks,
                        aggregation=aggregation,
                        normalize=normalize,
                        backend=backend,
                    )
                )
                channels = stage.channels
            self.stages.append(blocks)
        self.head = nn.Linear(channels, num_classes, bias=head_bias)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], codebooks: Sequence[Codebook], **overrides: Any
    ) -> CodedResNeXt:
        """Returns the network that `model.config` and `model.stage_codebooks` describe."""
        arguments = {**config, **overrides}
        stages = [Stage(**stage) for stage in arguments.pop("stages")]
        return cls(stages, codebooks=codebooks, **arguments)

    @property
    def blocks(self) -> list[CodedBottleneck]:
        """Returns all blocks, first to last."""
        return [block for stage in self.stages for block in stage]  # type: ignore[attr-defined]

    @property
    def coded_blocks(self) -> list[CodedBottleneck]:
        """Returns the blocks that follow a codebook, first to last."""
        return [block for block in self.blocks if block.is_coded]

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Returns the codebook of every coded block, in the order of the returned energies."""
        return tuple(block.codebook for block in self.coded_blocks if block.codebook is not None)

    @overload
    def forward(
        self, x: Tensor, return_energies: Literal[False] = False, keep: Keep | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, return_energies: Literal[True], keep: Keep | None = None
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self, x: Tensor, return_energies: bool = False, keep: Keep | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Classifies images.

        Args:
            x: `[B, in_channels, H, W]`, `B >= 1`.
            return_energies: also return the branch energies.
            keep: branches to keep in the coded blocks, (10): a class index (the branches of one
                class for all samples), a tensor `[B]` of class indices (one class per sample), or
                a sequence with a mask `[B, N]`, or None, for every coded block.

        Returns:
            Logits `[B, K]`, and with `return_energies` also a list with the normalised energies
            `[B, N]` of every coded block.

        Raises:
            ValueError: an argument has the wrong shape, or a class is out of range.
        """
        x, return_energies = _traced_option(x, "return_energies", return_energies, False)
        # A trace of TorchScript makes tensors of numbers.
        check_kind("return_energies", return_energies, (bool, Tensor), "True or False")
        x, keep = _traced_option(x, "keep", keep, None)
        last_map, energies = self.features(x, keep)
        logits = self.forward_head(last_map)
        return (logits, energies) if return_energies else logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images `[B, in_channels, H, W]` to the last block's output `[B, C, H', W']`."""
        return self.features(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps the last block's output to logits `[B, K]`.

        Args:
            x: `[B, C, H', W']`, from `forward_features`.
            pre_logits: stop behind the pooling, at `[B, C]`.
        """
        return x.mean((2, 3)) if pre_logits else classify(self.head, x)

    def get_classifier(self) -> nn.Module:
        """Returns the layer that makes the logits."""
        return self.head

    def reset_classifier(
        self,
        num_classes: int,
        *,
        codebooks: Sequence[Codebook] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Turns the network to other classes, in place: fresh head, codebooks of their number.

        All other weights stay. With the number of classes that it has and nothing else given, the
        network keeps its codebooks. A `CodedLoss` made before is for the old ones.

        Args:
            num_classes: number of classes `K`.
            codebooks: as for the network itself.
            class_names: as for the network itself.

        Raises:
            ValueError: as when a network is made.
        """
        check_integers(2, num_classes=num_classes)
        if num_classes == self.config["num_classes"] and codebooks is None and class_names is None:
            codebooks, class_names = self.stage_codebooks, self.class_names
        stages = [Stage(**stage) for stage in self.config["stages"]]
        books = assign_codebooks(stages, num_classes, codebooks, class_names)
        self.class_names = check_class_names(books, num_classes, class_names)
        self.stage_codebooks = tuple(book for book in books if book is not None)
        for blocks, book in zip(self.stages, books, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                if book is not None:
                    block.assign(book)
        self.num_classes = self.config["num_classes"] = num_classes
        like = self.stem[0].weight
        self.head = nn.Linear(
            self.config["stages"][-1]["channels"],
            num_classes,
            bias=self.config["head_bias"],
            device=like.device,
            dtype=like.dtype,
        ).train(self.training)

    def walk(
        self,
        x: Tensor,
        keep: Keep | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> Iterator[Step]:
        """Yields a `Step` behind each block: the block, its map and its energies.

        Every partial pass is made of this: a loop that ends early goes no further, and a map that
        is replaced is what the next block takes.

        Args:
            x: images `[B, in_channels, H, W]`, or the input of block `start`.
            keep: as for `forward`; a sequence has a mask for each coded block of the walk.
            start: the first block, counted from 0; None starts with the stem.
            stop: the block before which to stop; None goes through all.

        Raises:
            ValueError: an argument has the wrong shape, or a class is out of range.
        """
        return walk(*self._prepared(x, keep, start, stop))

    def features(
        self,
        x: Tensor,
        keep: Keep | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the map at the end of a walk and the energies of its coded blocks.

        Arguments as for `walk`. A walk without blocks ends behind the stem.
        """
        return features(*self._prepared(x, keep, start, stop))

    def _prepared(
        self, x: Tensor, keep: Keep | None, start: int | None, stop: int | None
    ) -> tuple[list[CodedBottleneck], Tensor, list[Tensor | None]]:
        """Returns the blocks of a walk, the input of the first, and the masks of the coded ones."""
        for name, value in (("start", start), ("stop", stop)):
            check_kind(name, value, (int, type(None)), "the number of a block, or None")
        blocks = self.blocks[start:stop]
        if start is None:
            check_images(x, self.in_channels)
        masks = self._keep_masks(keep, x, [block for block in blocks if block.is_coded])
        return blocks, self.stem(x) if start is None else x, masks

    @torch.no_grad()
    def extend_classes(self, new_classes: Sequence[str], *, seed: int = 0) -> CodedResNeXt:
        """Returns a network for more classes, with the weights of this one.

        Each codebook keeps its codewords and gains balanced, distant ones; the classifier gains
        rows with fresh weights. The logits and energies of the known classes stay what they are.

        Args:
            new_classes: names of the classes to add, at least one, none known already.
            seed: of the new codewords.

        Raises:
            ValueError: the names do not fit, a codebook has no room for so many classes, or layers
                were changed since the network was made.
        """
        check_layers(self, "extending copies the weights of its own layers")
        check_items("new_classes", new_classes, str)
        check_integers(0, seed=seed)
        names = [*self.class_names, *new_classes]
        if len(names) == self.num_classes or len(set(names)) < len(names):
            raise ValueError(
                "new_classes: expected at least one name, distinct and none of the known ones, "
                f"got {list(new_classes)}"
            )
        grown = CodedResNeXt.from_config(
            {**self.config, "num_classes": len(names)},
            [book.extend(list(new_classes), seed=seed) for book in self.stage_codebooks],
            class_names=names,
            backend=self.blocks[0].backend,
        ).to(self.head.weight)
        check_settings(self, grown, "extending makes them anew")
        state = self.state_dict()
        for name, value in grown.state_dict().items():
            if name.startswith("head."):
                value[: self.num_classes] = state[name]
            elif not name.endswith(".codewords"):
                value.copy_(state[name])
        return grown.train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuses weights for other codewords before any of the network's own is overwritten."""
        for stage, blocks in enumerate(self.stages):
            for index, block in enumerate(blocks.children()):
                if isinstance(block, CodedBottleneck):
                    block.check_codewords(state_dict, f"{prefix}stages.{stage}.{index}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _keep_masks(
        self, keep: Keep | None, x: Tensor, blocks: Sequence[CodedBottleneck]
    ) -> list[Tensor | None]:
        """Returns one mask `[B, N]`, or None, for each of these coded blocks."""
        if keep is None:
            return [None] * len(blocks)
        if not self.coded_blocks:
            raise ValueError("keep: expected None, since this network has no coded block")
        if isinstance(keep, (int, np.integer)) and not isinstance(keep, bool):
            self._check_class(int(keep), int(keep))
            return [
                block.codewords[int(keep)].to(x.device).expand(x.shape[0], -1) for block in blocks
            ]
        if isinstance(keep, Tensor):
            if keep.shape != (x.shape[0],) or keep.is_floating_point() or keep.dtype == torch.bool:
                raise ValueError(
                    f"keep: expected a class, {x.shape[0]} class indices, or a sequence of masks; "
                    f"got a tensor {list(keep.shape)} of {keep.dtype}"
                )
            if keep.device.type == "cpu" and not torch.compiler.is_compiling():
                self._check_class(int(keep.min()), int(keep.max()))
            keep = keep.to(x.device).long()
            return [block.codewords.to(x.device)[keep] for block in blocks]
        if not isinstance(keep, Sequence) or any(
            not isinstance(mask, Tensor | None) for mask in keep
        ):
            raise ValueError(
                "keep: expected a class, a tensor of class indices, or a sequence of masks or None "
                f"for the coded blocks; got {keep!r:.80}"
            )
        masks = list(keep)
        if len(masks) != len(blocks):
            raise ValueError(
                f"keep: expected a mask for each of {len(blocks)} coded blocks, got {len(masks)}"
            )
        return masks

    def _check_class(self, low: int, high: int) -> None:
        classes = self.stage_codebooks[0].classes
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"keep: expected classes 0 to {classes - 1}, got {wrong}")


def _traced_option(x: Tensor, name: str, value: Any, default: Any) -> tuple[Tensor, Any]:
    """Returns an option as it is; in a symbolic trace of `torch.fx`, which cannot follow it, its
    default, and images behind a check that it has no other value."""
    if not isinstance(value, fx.Proxy):
        return x, value
    return check_untraced(x, name, value, default), default


def check_untraced(x: Tensor, name: str, value: Any, default: Any) -> Tensor:
    """Returns `x`, where an option that a trace has fixed is asked for as it was traced.

    Raises:
        ValueError: it is asked for with another value.
    """
    if value is not default:
        raise ValueError(
            f"{name}: expected {default}, as the network was traced; for another value trace it "
            f"with concrete_args={{{name!r}: ...}}, got {value!r:.80}"
        )
    return x


def own_network(model: nn.Module) -> CodedResNeXt:
    """Returns the network within wrappers for devices, averaging and compilation.

    Raises:
        ValueError: there is none.
    """
    network = model
    while not isinstance(network, CodedResNeXt):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"model: expected a CodedResNeXt, got {type(model).__name__}")
        network = inner
    return network


def usual_image_size(stem: Stem) -> int:
    """Returns height and width, in pixels, of the images that a stem is meant for."""
    return 32 if stem == "conv3x3" else 224


def make_stem(stem: Stem, in_channels: int, channels: int) -> nn.Sequential:
    """Makes the layers before the first block: convolution, BatchNorm, ReLU, and max-pooling."""
    small = stem == "conv3x3"
    conv = nn.Conv2d(
        in_channels,
        channels,
        3 if small else 7,
        1 if small else 2,
        1 if small else 3,
        bias=False,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(channels), StemReLU()]
    if not small:
        layers.append(nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Stage:
    """A run of bottleneck blocks of one size."""

    depth: int
    """Number of blocks."""
    channels: int
    """Output channels `C` of every block."""
    width: int
    """Channels `D` of one branch."""
    branches: int
    """Number of branches `N`."""
    active: int
    """Branches `A` that work for each class; all of them (`A = N`) is a plain stage."""
    stride: int = 1
    """Stride of the first block."""

    def __post_init__(self) -> None:
        check_integers(**{f"Stage.{name}": value for name, value in asdict(self).items()})
        if self.active > self.branches:
            raise ValueError(
                f"Stage.active: expected at most {self.branches} branches, got {self.active}"
            )

    @property
    def is_coded(self) -> bool:
        """Returns whether a codebook assigns the branches of this stage to classes."""
        return self.active < self.branches


def default_codebook(
    classes: int, branches: int, active: int, class_names: Sequence[str] | None = None
) -> Codebook:
    """Returns the shipped codebook of a size, or the one that a seeded search finds."""
    size = Size(classes, branches, active)
    shipped = size in shipped_sizes()
    codebook = Codebook.shipped(*size) if shipped else Codebook.search(*size)
    return codebook if class_names is None else codebook.with_class_names(class_names)


def assign_codebooks(
    stages: Sequence[Stage],
    num_classes: int,
    codebooks: Sequence[Codebook] | None,
    class_names: Sequence[str] | None,
) -> list[Codebook | None]:
    """Returns the codebook of every stage, None for plain ones; equal ones are one object."""
    coded = [stage for stage in stages if stage.is_coded]
    if codebooks is None:
        codebooks = [
            default_codebook(num_classes, stage.branches, stage.active, class_names)
            for stage in coded
        ]
    check_items("codebooks", codebooks, Codebook)
    if len(codebooks) != len(coded):
        raise ValueError(
            f"codebooks: expected one for each of {len(coded)} coded stages, got {len(codebooks)}"
        )
    for stage, codebook in zip(coded, codebooks, strict=True):
        expected = (num_classes, stage.branches, stage.active)
        sizes = (codebook.classes, codebook.branches, codebook.active)
        if sizes != expected:
            raise ValueError(
                "codebooks: expected (classes, branches, active) = "
                f"{expected} as in the stage, got {sizes}"
            )
        if codebook.class_names != codebooks[0].class_names:
            raise ValueError("codebooks: expected the same classes in the same order in all")
    unique = {codebook: codebook for codebook in reversed(codebooks)}
    remaining = iter(codebooks)
    return [unique[next(remaining)] if stage.is_coded else None for stage in stages]


def check_class_names(
    codebooks: Sequence[Codebook | None], num_classes: int, class_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Returns the names of the classes; the codebooks' when there are any, and they must agree."""
    known = next((book.class_names for book in codebooks if book is not None), None)
    if class_names is None:
        return known or tuple(map(str, range(num_classes)))
    check_items("class_names", class_names, str)
    names = tuple(class_names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ValueError(f"class_names: expected {num_classes} distinct names, got {len(names)}")
    if known is not None and names != known:
        raise ValueError("class_names: expected the classes of the codebooks, in their order")
    return names
