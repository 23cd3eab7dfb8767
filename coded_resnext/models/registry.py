"""Named networks: those of the paper, small ones for a CPU, and their plain twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.kernels.checks import typed

from .checkpoint import check_codebooks, load_model, network_of, shipped_weights, weights_of
from .resnext import CodedResNeXt, Stage
from .warm_start import load_plain_weights


@dataclass(frozen=True)
class Architecture:
    """The sizes of a named network, coded or plain."""

    make_stages: Callable[[tuple[int, ...]], list[Stage]]
    """Makes the stages for given numbers of active branches, one number for each stage."""
    branches: int
    """Branches `N` of every stage."""
    active: tuple[int, ...]
    """Active branches of every stage of the coded network."""
    num_classes: int
    """Number of classes `K`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `CodedResNeXt`."""
    codebook_variant: str = "best"
    """Variant of the shipped codebooks."""
    has_twin: bool = True
    """Whether its plain twin has a name; that of a variant is another network's."""


def _cifar(branches: int, width: int) -> Callable[[tuple[int, ...]], list[Stage]]:
    """Returns a maker of three stages of three blocks; the paper's table of architectures."""

    def make_stages(active: tuple[int, ...]) -> list[Stage]:
        return [
            Stage(3, 256 << i, width << i, branches, a, stride=1 if i == 0 else 2)
            for i, a in enumerate(active)
        ]

    return make_stages


def _resnext50(active: tuple[int, ...]) -> list[Stage]:
    return [
        Stage(depth, 256 << i, 4 << i, 32, a, stride=1 if i == 0 else 2)
        for i, (depth, a) in enumerate(zip((3, 4, 6, 3), active, strict=True))
    ]


def _split_resnext50(active: tuple[int, ...]) -> list[Stage]:
    """Makes ResNeXt-50 whose third stage has two ratios, one for each half of its blocks."""
    stages = _resnext50((*active[:3], active[4]))
    half = replace(stages[2], depth=stages[2].depth // 2)
    return [*stages[:2], half, replace(half, active=active[3], stride=1), stages[3]]


def _small_resnext50(active: tuple[int, ...]) -> list[Stage]:
    """Makes the shape of ResNeXt-50 with one block in each stage, to try out recipes with."""
    return [
        Stage(1, 32 << i, 1 << i, 32, a, stride=1 if i == 0 else 2) for i, a in enumerate(active)
    ]


def _digits(active: tuple[int, ...]) -> list[Stage]:
    """Makes stages whose channels are multiples of the branches, to be concatenated too."""
    return [
        Stage(1, 60, 6, 10, active[0]),
        Stage(2, 120, 8, 10, active[1], stride=2),
        Stage(2, 200, 12, 10, active[2]),
    ]


def _small(active: tuple[int, ...]) -> list[Stage]:
    """Makes stages for a CPU: each halves the map. Channels are as in `_digits`."""
    return [
        Stage(depth, 60 << i, 4 << i, 10, a, stride=2)
        for i, (depth, a) in enumerate(zip((1, 2, 2), active, strict=True))
    ]


def _cifar_small(active: tuple[int, ...]) -> list[Stage]:
    """Makes stages for a CPU, which waits for memory where maps are large: each halves the map."""
    return [Stage(2, 128 << i, 8 << i, 10, a, stride=2) for i, a in enumerate(active)]


_IMAGENET: dict[str, Any] = {"stem": "conv7x7"}
NETWORKS = {
    "resnext14_32x1d": Architecture(
        _small_resnext50, 32, (32, 32, 16, 8), 1000, {"stem": "conv7x7", "stem_channels": 16}
    ),
    "resnext17_10x4d": Architecture(
        _small, 10, (10, 5, 3), 10, {"stem_channels": 32}, codebook_variant="paper"
    ),
    "resnext29_10x11d": Architecture(_cifar(10, 11), 10, (10, 5, 3), 10, codebook_variant="paper"),
    "resnext29_20x6d": Architecture(_cifar(20, 6), 20, (20, 8, 4), 100),
    "resnext50_32x4d": Architecture(_resnext50, 32, (32, 32, 16, 8), 1000, _IMAGENET),
    # The variants of the paper's appendix, named after the stage that differs.
    "resnext50_32x4d_c3": Architecture(
        _resnext50, 32, (32, 24, 16, 8), 1000, _IMAGENET, has_twin=False
    ),
    "resnext50_32x4d_c4": Architecture(
        _split_resnext50, 32, (32, 32, 16, 8, 8), 1000, _IMAGENET, has_twin=False
    ),
    "resnext50_32x4d_c5": Architecture(
        _resnext50, 32, (32, 32, 16, 4), 1000, _IMAGENET, has_twin=False
    ),
    "resnext_cifar10_small": Architecture(
        _cifar_small, 10, (10, 5, 3), 10, {"stem_channels": 32}, codebook_variant="paper"
    ),
    "resnext_digits": Architecture(
        _digits, 10, (10, 5, 3), 10, {"in_channels": 1, "stem_channels": 32, "image_size": 8}
    ),
}


@typed
def list_models(*, pretrained: bool = False) -> list[str]:
    """Returns the names that `create_model` takes: every network plain and, prefixed, coded.

    Args:
        pretrained: only those that weights are shipped for.
    """
    if pretrained:
        return [network_of(name) for name in shipped_weights()]
    plain = [name for name, architecture in NETWORKS.items() if architecture.has_twin]
    return sorted([*plain, *(f"coded_{name}" for name in NETWORKS)])


@typed
def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> CodedResNeXt:
    """Builds a named network, with fresh weights or with those that come with the package.

    As ever with PyTorch, the network is in training mode.

    Args:
        name: one of `list_models()`; `resnext..` is the plain twin of `coded_resnext..`.
        pretrained: start from the shipped weights; `list_models(pretrained=True)` names the
            networks that have some. Another number of classes has a fresh head and codebooks of
            its own, other image channels an adapted first convolution.
        overrides: arguments of `CodedResNeXt` that replace the network's own, such as
            `num_classes`, `in_channels`, `codebooks` or `drop_branches`. `codebook_variant`
            chooses among the shipped codebooks: `"paper"` the published ones, `"best"` those of
            the largest distance that is known; the default is the network's, published for
            CIFAR-10 and else the best. `active` says how many branches of each stage work for a
            class, such as `(32, 32, 16, 8)`; a stage in which all do is plain.

    Raises:
        ValueError: there is no such network, no weights are shipped for it, an override does not
            fit it or the weights, or no codebook of the variant is shipped in this size.
        TypeError: an override is not an argument of `CodedResNeXt`.
    """
    if not pretrained:
        return CodedResNeXt(**network_arguments(name, **overrides))
    source = load_pretrained(name)
    overrides = trained_arguments(source, overrides) | overrides
    model = CodedResNeXt(**network_arguments(name, **overrides))
    if model.num_classes == source.num_classes:
        check_codebooks(source.stage_codebooks, model.stage_codebooks)
    load_plain_weights(model, source.state_dict())
    return model


def load_pretrained(name: str) -> CodedResNeXt:
    """Returns a network with the weights that are shipped for it; a ValueError if none are."""
    folder = weights_of(name)
    if folder is None:
        raise ValueError(
            f"pretrained: expected a network that weights are shipped for, "
            f"{' or '.join(list_models(pretrained=True))}, got {name!r}"
        )
    return load_model(folder).model


def trained_arguments(source: CodedResNeXt, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the classes and codebooks that weights were trained for, unless others are meant."""
    if overrides.get("num_classes", source.num_classes) != source.num_classes:
        return {}
    return {"codebooks": source.stage_codebooks, "class_names": source.class_names}


def network_arguments(
    name: str,
    *,
    codebook_variant: str | None = None,
    active: Sequence[int] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Returns the arguments of `CodedResNeXt` for a named network, as `create_model`."""
    if name not in list_models():
        raise ValueError(f"name: expected one of {', '.join(list_models())}; got {name!r}")
    architecture = NETWORKS[name.removeprefix("coded_")]
    coded = name.startswith("coded_")
    every = (architecture.branches,) * len(architecture.active)
    chosen = tuple(architecture.active if active is None else active) if coded else every
    if len(chosen) != len(every) or not all(0 < a <= architecture.branches for a in chosen):
        raise ValueError(
            f"active: expected {len(every)} numbers from 1 to {architecture.branches}, one for a "
            f"stage, got {list(chosen)}"
        )
    arguments = {
        "stages": architecture.make_stages(chosen),
        "num_classes": architecture.num_classes,
        **architecture.arguments,
        **overrides,
    }
    if codebook_variant is not None and {"stages", "codebooks"} & overrides.keys():
        raise ValueError("codebook_variant: expected none beside stages or codebooks")
    changed = {"stages", "num_classes", "codebooks"} & overrides.keys() or active is not None
    variant = codebook_variant or ("best" if changed else architecture.codebook_variant)
    if variant != "best" and coded:
        names = overrides.get("class_names")
        books = [
            Codebook.shipped(arguments["num_classes"], architecture.branches, a, variant)
            for a in chosen
            if a < architecture.branches
        ]
        arguments["codebooks"] = [b.with_class_names(names) if names else b for b in books]
    return arguments
