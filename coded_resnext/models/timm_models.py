"""Our networks in timm: importing this module registers them with `timm.create_model`.

    import timm, coded_resnext.timm_models
    model = timm.create_model("coded_resnext50_32x4d", num_classes=100)

All networks of the registry are there, but for the plain one that timm has itself. A network made
by timm is a `CodedResNeXt` with the same names of weights; it still returns energies on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coded_resnext.codebooks.codebook import Codebook

from .block import check_images
from .checkpoint import MODEL_FILE, load_model, weights_of
from .registry import list_models, load_pretrained, network_arguments, trained_arguments
from .resnext import CodedResNeXt, usual_image_size
from .warm_start import plain_state

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
    from timm.models._features import feature_take_indices
except ImportError as error:
    raise ImportError("timm is not installed: pip install 'coded-resnext[timm]'") from error


class TimmCodedResNeXt(CodedResNeXt):
    """A network of the registry with timm's conventions.

    Args:
        name: one of `list_models()`.
        num_classes: number of classes `K`, or 0 for no classifier; the codebooks then are those of
            the named network.
        in_chans: channels of the images.
        global_pool: `"avg"`, or `""` for none, only without classifier.
        drop_rate: dropout before the classifier.
        device, dtype: where, and as what, the weights are made.
        overrides: further arguments of `CodedResNeXt`, such as `codebooks` or `head_bias`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        in_chans: int | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> None:
        if num_classes:
            overrides["num_classes"] = num_classes
        if in_chans is not None:
            overrides["in_channels"] = in_chans
        with torch.device(torch.get_default_device() if device is None else device):
            super().__init__(**network_arguments(name, **overrides))
        self.in_chans = self.in_channels
        self.drop_rate = drop_rate
        self.global_pool = "avg"
        # Codewords come from NumPy, and are on the CPU whatever the default device.
        self.to(device=self.head.weight.device, dtype=dtype)
        if num_classes == 0:
            self.reset_classifier(0, global_pool)
        else:
            self._set_pool(global_pool)

    @property
    def num_features(self) -> int:
        """Returns the number of channels of the last map."""
        return int(self.feature_info[-1]["num_chs"])

    @property
    def head_hidden_size(self) -> int:
        """Returns the number of channels before the classifier."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Returns channels, reduction and module of the maps behind stem and stages."""
        small = self.config["stem"] == "conv3x3"
        reduction = 1 if small else 2
        channels = self.config["stem_channels"]
        info = [{"num_chs": channels, "reduction": reduction, "module": "stem.2"}]
        reduction = 1 if small else 4
        for index, stage in enumerate(self.config["stages"]):
            reduction *= stage["stride"]
            info.append(
                {
                    "num_chs": stage["channels"],
                    "reduction": reduction,
                    "module": f"stages.{index}",
                }
            )
        return info

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth: by stage, or by block."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

    def get_classifier(self, name_only: bool = False) -> Any:
        """Returns the classifier, or its name."""
        return "head" if name_only else self.head

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        *,
        codebooks: Sequence[Codebook] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Resets as `CodedResNeXt`; 0 takes the classifier away and keeps the codebooks.

        Raises:
            AssertionError: a pooling that is not average or, without classifier, none; so timm
                has it.
        """
        if num_classes:
            super().reset_classifier(num_classes, codebooks=codebooks, class_names=class_names)
        else:
            self.num_classes = 0
            self._modules["head"] = nn.Identity()
        if global_pool is None:
            # A classifier reads one vector for each image, also where pooling had been off.
            global_pool = "avg" if num_classes else self.global_pool
        self._set_pool(global_pool)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Makes of the last map `[B, C, H', W']` logits, or with `pre_logits` their input."""
        pooled = x.mean((2, 3)) if self.global_pool else x
        if pre_logits:
            return pooled
        logits: Tensor = self.head(F.dropout(pooled, self.drop_rate, self.training))
        return logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the maps behind the stem's ReLU and the stages, counted from 0, and the last map.

        Args:
            x: `[B, C, H, W]`.
            indices: which maps; a number means the last so many, None all.
            norm: without effect, since no norm follows the last stage.
            stop_early: compute no stage behind the last map that is wanted.
            output_fmt: `"NCHW"`, as timm writes it.
            intermediates_only: leave out the last map.
        """
        assert output_fmt == "NCHW", f"output_fmt: expected 'NCHW', got {output_fmt!r}"
        taken, last = feature_take_indices(len(self.stages) + 1, indices)
        check_images(x, self.in_channels)
        maps: list[Tensor] = []
        for layer in self.stem:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        depths = [stage["depth"] for stage in self.config["stages"]]
        ends = list(accumulate(depths))[: last if stop_early else None]
        for count, step in enumerate(self.walk(x, start=0, stop=max(ends, default=0)), 1):
            if count in ends:
                x = step.map
                maps.append(x)
        wanted = [maps[index] for index in taken]
        return wanted if intermediates_only else (x, wanted)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Takes away, in place, the stages behind the last map that is wanted, and the classifier.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: without effect.
            prune_head: take the classifier away even when no stage goes.

        Returns:
            The indices, counted from 0.
        """
        taken, last = feature_take_indices(len(self.stages) + 1, indices)
        if last < len(self.stages):
            prune_head = True
            self.stages = self.stages[:last]
            self.config["stages"] = self.config["stages"][:last]
            coded = sum(stage["active"] < stage["branches"] for stage in self.config["stages"])
            self.stage_codebooks = self.stage_codebooks[:coded]
        if last == 0:
            self.stem = self.stem[:3]
        if prune_head:
            self.reset_classifier(0, "")
        return list(taken)

    def _set_pool(self, global_pool: str) -> None:
        possible = ("avg",) if self.num_classes else ("avg", "")
        assert global_pool in possible, (
            f"global_pool: expected 'avg', or '' without classifier, got {global_pool!r}"
        )
        self.global_pool = global_pool


def _filter_state(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns weights of our names, timm's or torchvision's, for `load_state_dict`.

    Codewords stay the model's own where the weights have none, or are for another number of
    classes; others are left in, so that the model refuses weights that were trained for them.
    """
    own = {k: v for k, v in model.state_dict().items() if k.endswith(".codewords")}
    given = {k: state_dict.get(k, v) for k, v in own.items()}
    codewords = {k: v if v.shape == own[k].shape else own[k] for k, v in given.items()}
    return codewords | plain_state(state_dict)


def _entry_point(network: str) -> Any:
    """Returns the function that `timm.create_model` calls for a network of the registry."""
    # Of features: the map behind the stem's ReLU, and those of all stages.
    everything = tuple(range(1 + len(network_arguments(network)["stages"])))

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # timm hands both over, None where the caller gave none.
        others = kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")
        if pretrained and not others and weights_of(network) is not None:
            kwargs = trained_arguments(load_pretrained(network), kwargs) | kwargs
        model: nn.Module = build_model_with_cfg(
            partial(TimmCodedResNeXt, network),
            network,
            pretrained,
            feature_cfg={"feature_cls": "getter", "out_indices": everything},
            pretrained_filter_fn=_filter_state,
            **kwargs,
        )
        return model

    create.__name__ = create.__qualname__ = network
    create.__doc__ = f"`{network}` of `coded_resnext.list_models()`."
    return create


def _default_cfg(network: str) -> dict[str, Any]:
    """Returns timm's description of a network: sizes, layers and statistics of the images."""
    arguments = network_arguments(network)
    large = arguments.get("stem") == "conv7x7"
    channels = arguments.get("in_channels", 3)
    size = arguments.get("image_size") or usual_image_size("conv7x7" if large else "conv3x3")
    stride = 4 if large else 1
    for stage in arguments["stages"]:
        stride *= stage.stride
    pool = size // stride
    weights = weights_of(network)
    return {
        "num_classes": arguments["num_classes"],
        "input_size": (channels, size, size),
        "pool_size": (pool, pool),
        **({"mean": (0.5,), "std": (0.5,)} if channels == 1 else {}),
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "mit",
        **({} if weights is None else _trained_cfg(weights)),
    }


def _trained_cfg(folder: Path) -> dict[str, Any]:
    """Returns what timm wants to know about shipped weights: file, images and classes."""
    loaded = load_model(folder)
    preprocessing = loaded.preprocessing
    assert preprocessing is not None, "shipped weights have a preprocessing"
    return {
        "file": str(folder / MODEL_FILE),
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "crop_pct": preprocessing.size / (preprocessing.resize or preprocessing.size),
        "label_names": loaded.model.class_names,
    }


# Those that timm has already are timm's.
_NAMES = [name for name in list_models() if not is_model(name)]
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in _NAMES})
for _name in _NAMES:
    globals()[_name] = register_model(_entry_point(_name))
