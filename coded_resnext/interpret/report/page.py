"""The report as one HTML file, with style, script and data in it: nothing is loaded from afar.

Long lists of numbers are base64, so that a page with a thousand classes stays small.
"""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coded_resnext import __version__

from .content import EXPERIMENTS

SCRIPTS = (
    "base",
    "chart",
    "chooser",
    "network",
    "samples",
    "curves",
    "classifiers",
    "exits",
    "codebooks",
    "training",
    "main",
)
MANY_CLASSES = 100
# What the template writes itself; the rest goes into the page as data.
_STATIC = (
    *("missing", "config", "command", "versions", "seconds", "ways", "title", "summary", "cost"),
)
_SECTIONS = (
    ("overview", "Overview", None),
    ("paths", "Paths", "coded"),
    ("early-decoding", "Early decoding", "early_decoding"),
    ("removal", "Removing branches", "removal"),
    ("classifiers", "Classifiers", "one_class"),
    ("early-exit", "Early exit", "early_exit"),
    ("codebooks", "Codebooks", "coded"),
    ("training", "Training", "training"),
    ("configuration", "Configuration", None),
)
# Shorter lists stay readable; longer lists of floats are rounded to single precision.
SHORTEST, MOST_DOUBLES = 16, 4096
_INTEGERS = (("u8", "<u1"), ("u16", "<u2"), ("i32", "<i4"))


def render(content: dict[str, Any]) -> str:
    """Returns the page of the content that `gather` returned.

    Nothing in a name or a setting is taken for markup: the template escapes, and the data is JSON
    without any `<`. The page's own policy forbids every request and every other script.

    Args:
        content: of a run, as `gather` returns it.

    Raises:
        ImportError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError("the report needs Jinja; install coded-resnext[report]") from error
    assets = files(__package__) / "assets"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    style = asset("page.css")
    parts = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    # Of many classes there are many short lists, and single precision keeps the file small.
    precision = {"most_doubles": 0} if len(content["class_names"] or ()) > MANY_CLASSES else {}
    data = pack({k: v for k, v in content.items() if k not in _STATIC}, **precision)
    shown = parts_shown(content)
    evaluation = content["evaluation"] or {}
    return environment.from_string(asset("page.html")).render(
        content=content,
        data=data,
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - files of this package
        style_hash=_hash(style),
        script_hash=_hash(script),
        subtitle=_subtitle(content),
        tiles=tiles(content),
        shown=shown,
        sections=[(id_, text) for id_, text, key in _SECTIONS if key is None or shown[key]],
        removal_note=_removal_note(evaluation.get("removal")),
        thresholds_note=_thresholds_note(evaluation),
        version=__version__,
    )


def parts_shown(content: dict[str, Any]) -> dict[str, bool]:
    """Says for which parts of the page there is content."""
    evaluation = content["evaluation"] or {}
    return {
        "coded": bool(content["codebooks"]),
        "training": content["training_log"] is not None,
        **{key: evaluation.get(key) is not None for key in EXPERIMENTS},
    }


def tiles(content: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the headline numbers, as far as they are known."""
    headlines: list[dict[str, str]] = []

    def add(value: str, name: str, note: str = "") -> None:
        headlines.append({"value": value, "name": name, "note": note})

    evaluation, summary, cost = content["evaluation"], content["summary"], content["cost"]
    if summary is not None:
        images = f"{evaluation['test_samples']:,} images"
        balanced = f"mean over the classes {100 * summary['test_balanced_accuracy']:.2f} %"
        add(f"{100 * summary['test_accuracy']:.2f} %", "test accuracy", f"{images}; {balanced}")
        early = summary["early_decoding"]
        if early:
            note = f"block {len(early)}: {100 * early[-1]:.1f} %" if len(early) > 1 else ""
            add(f"{100 * early[0]:.1f} %", "decoded at the first coded block", note)
        if evaluation["one_class"] is not None:
            precisions = summary["single_class_average_precision"]
            known = [value for value in precisions if value is not None]
            mean = f"{math.fsum(known) / len(known):.3f}" if known else "n/a"
            note = f"one class against the rest, {len(known):,} of {len(precisions):,} classes"
            add(mean, "mean average precision", note)
    if cost is not None:
        whole, part = cost["network"], cost["classifier"]
        size = content["image_size"]
        image = f"an image of {size} by {size} pixels" if size else "one image"
        add(_count(whole["parameters"]), "parameters", _bytes(whole["bytes"]))
        add(_count(whole["macs"]), "multiply-accumulates", image)
        if part is not None:
            share = part["share_of_network"]
            add(
                f"{100 * share['parameters']:.0f} %",
                "of the parameters do for one class",
                f"and {100 * share['macs']:.0f} % of the multiply-accumulates",
            )
    return headlines


def _count(number: int) -> str:
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def _subtitle(content: dict[str, Any]) -> str:
    parts = []
    if content["class_names"] is not None:
        parts.append(f"{len(content['class_names']):,} classes")
        coded = len(content["block_codebooks"])
        parts.append(f"{coded} coded blocks" if coded else "a plain network, without codebooks")
    provenance = (content["evaluation"] or {}).get("provenance")
    if provenance is not None:
        test = provenance["test"]
        names = [word for word in (test["name"], test["split"]) if word]
        where = f"{' '.join(names)}, " if names else ""
        parts.append(f"measured on {where}{test['samples']:,} images")
    training = []
    data = (content["config"] or {}).get("data")
    if isinstance(data, str):
        training.append(f"on {data}")
    if content["seconds"] is not None:
        minutes = content["seconds"] / 60
        took = f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
        training.append(f"in {took}")
    if training:
        parts.append(f"trained {' '.join(training)}")
    return " · ".join(parts)


def _removal_note(removal: dict[str, Any] | None) -> str:
    repeats = (removal or {}).get("repeats", 1)
    if repeats == 1:
        return "Branches were drawn at random once."
    return f"Branches were drawn at random {repeats} times; the band is one deviation."


def _thresholds_note(evaluation: dict[str, Any]) -> str:
    if evaluation.get("thresholds_from") == "test data":
        return (
            "Thresholds are those of the best F1 on the test images themselves, as there were no "
            "others; precision, recall and F1 in the table are optimistic."
        )
    return "Thresholds are those of the best F1 on the training images."


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def pack(value: Any, most_doubles: int = MOST_DOUBLES) -> Any:
    """A JSON-ready value whose long lists, and lists of equally long ones, of numbers are packed.

    Such a list becomes `{"packed": base64, "type": "u8", "u16", "i32", "f32" or "f64"}`, little-
    endian, a list of lists with their length as `"width"`. None among numbers becomes NaN. Whole
    numbers stay exact.

    Args:
        value: of dictionaries, lists, numbers, texts and None.
        most_doubles: longest list of floats that stays exact in any case; those of longer ones are
            rounded to single precision.
    """
    if isinstance(value, dict):
        return {key: pack(part, most_doubles) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    width = None
    numbers = value
    if value and all(isinstance(row, list) and len(row) == len(value[0]) for row in value):
        width = len(value[0])
        numbers = [entry for row in value for entry in row]
    if width == 0 or len(numbers) < SHORTEST or not all(map(_is_number, numbers)):
        return [pack(part, most_doubles) for part in value]
    kind, array = _array(numbers, most_doubles)
    packed = {"packed": base64.b64encode(array.tobytes()).decode("ascii"), "type": kind}
    return packed if width is None else {**packed, "width": width}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _array(numbers: list[Any], most_doubles: int) -> tuple[str, NDArray[Any]]:
    if all(isinstance(number, int) for number in numbers):
        low, high = min(numbers), max(numbers)
        for kind, dtype in _INTEGERS:
            limits = np.iinfo(dtype)
            if limits.min <= low and high <= limits.max:
                return kind, np.array(numbers, dtype)
    exact = np.array([np.nan if number is None else number for number in numbers], "<f8")
    with np.errstate(over="ignore"):
        single = exact.astype("<f4")
    if len(exact) > most_doubles or np.array_equal(single.astype("<f8"), exact, equal_nan=True):
        return "f32", single
    return "f64", exact
