"""Checks of the public operations' arguments; every error names the argument."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from .layout import transformed

Aggregation = Literal["sum", "concat"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

DEBUG_VARIABLE = "CODED_RESNEXT_DEBUG"


def check_targets(
    targets: Tensor, batch: int, classes: int, ignore_index: int | None = None
) -> bool:
    """Refuse targets that are neither `[B]` class indices in range nor `[B, K]` probabilities.

    The class index `ignore_index` stands for a sample without a label; without it all must have
    one. Values are read on CPU tensors only, so that a step on an accelerator never waits for them.

    Returns:
        Whether every sample is known to have a label that is a class, or probabilities.
    """
    check_kind("targets", targets, Tensor, "a tensor [B] or [B, K]")
    if targets.shape not in ((batch,), (batch, classes)):
        raise ValueError(
            f"targets: expected shape [{batch}] or [{batch}, {classes}], got {list(targets.shape)}"
        )
    if targets.ndim == 2:
        if not targets.is_floating_point():
            raise ValueError(f"targets: expected floating-point probabilities, got {targets.dtype}")
        check_finite("targets", targets)
        return True
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"targets: expected integer class indices, got {targets.dtype}")
    if not _readable(targets) or batch == 0:
        return False
    low, high = (int(bound) for bound in targets.aminmax())
    ignoring = ignore_index is not None and low <= ignore_index <= high
    labelled = low >= 0 and high < classes and not ignoring
    if not labelled:
        labels = targets.long()
        wrong = labels[is_no_class(labels, classes)]
        if ignoring:
            wrong = wrong[wrong != ignore_index]
        if wrong.numel():
            raise ValueError(f"targets: expected classes 0 to {classes - 1}, got {int(wrong[0])}")
    return labelled


def is_no_class(targets: Tensor, classes: int) -> Tensor:
    """Returns which class indices are outside `0 .. classes - 1`.

    They are of 64 bits: PyTorch would bring the bounds to the dtype of narrower ones.
    """
    return (targets < 0) | (targets >= classes)


def check_class_weight(weight: Tensor | None, classes: int) -> None:
    """Refuse weights of classes that are not `[K]`, finite and at least 0."""
    if weight is None:
        return
    if weight.shape != (classes,) or not weight.is_floating_point():
        raise ValueError(
            f"class_weight: expected floating-point numbers [{classes}], "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if _readable(weight) and not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError("class_weight: expected finite numbers of at least 0, got others")


def checked_number(name: str, value: object, lowest: float = -math.inf) -> float:
    """Returns a number of Python, NumPy or PyTorch as a float.

    Raises:
        ValueError: it is no number, not finite, or below the lowest.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number >= lowest):
        least = "" if lowest == -math.inf else f" of at least {lowest:g}"
        raise ValueError(f"{name}: expected a finite number{least}, got {value!r:.80}")
    return number


def check_integers(lowest: int = 1, **values: object) -> None:
    """Refuse arguments that are no whole numbers, or below the lowest."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < lowest:
            least = "a positive integer" if lowest == 1 else f"an integer of at least {lowest}"
            raise ValueError(f"{name}: expected {least}, got {value!r:.80}")


def check_kind(name: str, value: object, kind: Any, expected: str) -> None:
    """Refuse an argument that is not of its kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")


def typed(function: FunctionT) -> FunctionT:
    """Makes a function refuse arguments that are not what its annotations say, with their names.

    For what users call a few times: a pass over a batch has checks of its own.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*values: Any, **named: Any) -> Any:
        check_annotated(function, signature.bind(*values, **named).arguments)
        return function(*values, **named)

    return checked  # type: ignore[return-value]


def check_annotated(annotated: Any, values: dict[str, Any]) -> None:
    """Refuse values that are not what the annotations of a function or a dataclass say."""
    hints = _hints(annotated)
    for name, value in values.items():
        if name in hints and not _is_of(value, hints[name]):
            expected = annotated.__annotations__[name]
            raise ValueError(f"{name}: expected {expected}, got {_described(value)}")


def _described(value: object) -> str:
    """Returns the type of a value, and of a list those of its items."""
    kind = type(value).__name__
    if not isinstance(value, list | tuple) or not value:
        return kind
    return f"{kind} of {' and '.join(sorted({type(item).__name__ for item in value}))}"


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    return get_type_hints(annotated)


def _is_of(value: Any, hint: Any) -> bool:
    """Returns whether a value is of the kind that an annotation says; so are the items of a list.

    What a text or a number may be is for its function to say.
    """
    kind, items = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(value, one) for one in items)
    if kind is Literal:
        return isinstance(value, tuple({type(item) for item in items}))
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return hasattr(value, "__float__") and not isinstance(value, bool | np.bool_)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is Path:
        return isinstance(value, os.PathLike)
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind not in (Iterable, Sequence, tuple):
        return isinstance(value, kind)
    if isinstance(value, list | tuple):
        return all(_is_of(item, items[0]) for item in value)
    several = Iterable if kind is Iterable else Collection
    return isinstance(value, several) and not isinstance(value, str | bytes | dict)


def check_items(name: str, values: object, kind: type) -> None:
    """Refuse an argument that is no sequence of a kind."""
    check_kind(name, values, Sequence, f"a sequence of {kind.__name__}")
    for value in values:  # type: ignore[attr-defined]
        check_kind(name, value, kind, f"a sequence of {kind.__name__}")


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity in a CPU tensor, with the argument's name."""
    if not _readable(value) or value.numel() == 0:
        return
    # NaN is the least and the largest of what it is among; `isfinite` takes five passes.
    if not all(map(math.isfinite, value.detach().aminmax())):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def check_debug(**values: Tensor) -> None:
    """With CODED_RESNEXT_DEBUG=1, refuse NaN and infinity on any device; the host waits for it."""
    if os.environ.get(DEBUG_VARIABLE) == "1" and not torch.compiler.is_compiling():
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _readable(value: Tensor) -> bool:
    """Returns whether the values can be read without waiting, and are numbers at all."""
    on_cpu = value.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling() and not transformed(value)


def check_kernels_differentiate(*values: Tensor) -> None:
    """Refuse what the kernels have no derivative for."""
    if transformed(*values):
        refuse_derivative()


def refuse_derivative(*_arguments: object) -> NoReturn:
    """Says that the kernels have one derivative in reverse mode and no other.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "the kernels have gradients of first order in reverse mode alone: for transforms of "
        'torch.func, forward mode and second derivatives use backend="torch"'
    )


def check_filled(name: str, value: Tensor, expected: str = "sample, channel and pixel") -> None:
    """Refuse a tensor without elements; by default a map `[B, C, H, W]`."""
    if 0 in value.shape:
        raise ValueError(f"{name}: expected at least one {expected}, got {list(value.shape)}")


def check_activations(h: Tensor, branches: int) -> None:
    """Refuse what is not `[B, N*D, H, W]` for `N` branches."""
    if h.ndim != 4 or not h.is_floating_point():
        raise ValueError(
            f"h: expected a floating-point tensor [B, N*D, H, W], got {h.dtype} {list(h.shape)}"
        )
    check_filled("h", h)
    channels = h.shape[1]
    if branches < 1 or channels % branches:
        raise ValueError(f"branches: expected a divisor of {channels} channels, got {branches}")


def check_aggregate(h: Tensor, weight: Tensor, branches: int, aggregation: str) -> bool:
    """Refuse arguments of `coded_aggregate` that do not fit; whether branches are concatenated."""
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation: expected 'sum' or 'concat', got {aggregation!r}")
    check_activations(h, branches)
    channels = h.shape[1]
    concatenate = aggregation == "concat"
    width = channels // branches if concatenate else channels
    check_device("weight", weight, h)
    if weight.ndim != 4 or weight.shape[1:] != (width, 1, 1):
        raise ValueError(f"weight: expected [C, {width}, 1, 1], got {list(weight.shape)}")
    if concatenate and weight.shape[0] % branches:
        raise ValueError(
            f"weight: expected output channels divisible by {branches} branches, "
            f"got {weight.shape[0]}"
        )
    return concatenate


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    """Refuse a tensor on another device than the activations."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as h, got {value.device}")


def check_affine(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Refuse an affine map of `x [B, C, H, W]` that is neither two vectors `[C]` nor absent."""
    if (scale is None) != (bias is None):
        missing = "scale" if scale is None else "bias"
        raise ValueError(f"{missing}: expected scale and bias, or neither; got one of them")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != (x.shape[1],) or vector.device != x.device:
            raise ValueError(
                f"{name}: expected [{x.shape[1]}] on {x.device}, "
                f"got {list(vector.shape)} on {vector.device}"
            )
        if not vector.is_floating_point():
            raise ValueError(f"{name}: expected floating-point numbers, got {vector.dtype}")


def check_loss(energies: Tensor, codewords: Tensor, exponent: float, threshold: float) -> None:
    """Refuse arguments of a coding loss that do not fit."""
    if energies.ndim != 2 or codewords.ndim != 2 or energies.shape[1] != codewords.shape[1]:
        raise ValueError(
            "energies: expected [B, N] for codewords [K, N], got "
            f"{list(energies.shape)} for {list(codewords.shape)}"
        )
    # A mean over no sample would be NaN.
    check_filled("energies", energies, "sample and branch")
    if not (math.isfinite(exponent) and exponent >= 1):
        raise ValueError(f"exponent: expected a number of at least 1, got {exponent}")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")


def checked_mask(
    name: str, mask: Tensor | None, h: Tensor, branches: int, dtype: torch.dtype
) -> Tensor | None:
    if mask is None:
        return None
    check_kind(name, mask, Tensor, "a tensor [B, N]")
    if mask.shape != (h.shape[0], branches):
        raise ValueError(f"{name}: expected [{h.shape[0]}, {branches}], got {list(mask.shape)}")
    return mask.to(device=h.device, dtype=dtype)
