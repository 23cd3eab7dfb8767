"""The card of a shared network: what it is, how it was trained, what it is not for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pretrained import Pretrained

SHOWN_CLASSES = 20
# What a table cell has room for; all of it is in config.json.
CELL = 120


def model_card(pretrained: Pretrained) -> str:
    """Markdown with the front matter that the Hub reads."""
    model = pretrained.model
    front = {
        "library_name": "coded-resnext",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "coded-resnext", "interpretability"],
    }
    if pretrained.license is not None:
        front["license"] = pretrained.license
    # A JSON value is a YAML value.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    names = ", ".join(map(_cell, model.class_names[:SHOWN_CLASSES]))
    names += ", .." if model.num_classes > SHOWN_CLASSES else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines += [
        f"# {pretrained.name}",
        "",
        _kind(pretrained),
        "",
        f"- {model.num_classes} classes: {names}",
        f"- {parameters:,} parameters",
        f"- input: {_input(pretrained)}",
        *(
            f"- stage {number}: {stage['depth']} blocks of {stage['channels']} channels, "
            f"{stage['branches']} branches of width {stage['width']}, " + _assignment(stage)
            for number, stage in enumerate(model.config["stages"], 1)
        ),
        f"- licence of the weights: {pretrained.license or 'not stated'}",
        "",
        "## Use",
        "",
        "```python",
        "from coded_resnext import from_pretrained",
        "",
        'pretrained = from_pretrained("FOLDER or OWNER/NAME")',
        "images = pretrained.preprocessing(picture)[None]  # a PIL image",
        "logits = pretrained.model(images)",
        "```",
        "",
        "## Training",
        "",
        *_table(pretrained.training, "How it was trained is not recorded."),
        "",
        "## Results",
        "",
        *_table(pretrained.results, "No results are recorded."),
        "",
        *_decisions(pretrained),
        "## What it should not be used for",
        "",
        f"- Images of anything but its {model.num_classes} classes: it always names one of them, "
        "and cannot say that an image shows none.",
        "- Images that are unlike its training images, or prepared in another way: no result "
        "above speaks for them.",
        "- Decisions about people, or where a mistake does harm, without a person who checks: "
        "nothing was measured on robustness, fairness or calibration unless it stands above.",
        "- As evidence of why an image got its class: branch energies show which branches were "
        "active, not what they saw.",
        "",
    ]
    return "\n".join(lines)


def _kind(pretrained: Pretrained) -> str:
    blocks = len(pretrained.model.coded_blocks)
    if not blocks:
        return (
            "An image classifier, a plain ResNeXt: the twin of a Coded ResNeXt, with no branch "
            "assigned to a class."
        )
    return (
        f"An image classifier, a Coded ResNeXt. In {blocks} coded blocks a codebook assigns "
        "branches to classes before training, so that the energies of the branches show the class, "
        "and a classifier of any single class can be cut out."
    )


def _assignment(stage: Mapping[str, Any]) -> str:
    if stage["active"] == stage["branches"]:
        return "plain"
    return f"{stage['active']} of them for each class"


def _input(pretrained: Pretrained) -> str:
    found = pretrained.preprocessing
    if found is None:
        return f"{pretrained.model.in_channels} channels; preprocessing not recorded"
    return (
        f"{found.size}x{found.size} pixels, {'grey' if found.channels == 1 else 'RGB'}, "
        f"intensities in 0..1 less {_numbers(found.mean)}, divided by {_numbers(found.std)}"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _decisions(pretrained: Pretrained) -> list[str]:
    """The section on thresholds and early exit, when there are any."""
    count, exit_ = len(pretrained.thresholds), pretrained.early_exit
    lines = []
    if count:
        lines.append(
            f"- {count} of {pretrained.model.num_classes} classes have a threshold for their "
            "one-class classifier, in `config.json`."
        )
    if exit_ is not None:
        margins = ", ".join("none" if m is None else f"{m:.3f}" for m in exit_.margins)
        lines.append(f"- Early exit at the coded blocks' margins {margins}.")
    return ["## Thresholds and early exit", "", *lines, ""] if lines else []


def _table(notes: Mapping[str, Any], empty: str) -> list[str]:
    if not notes:
        return [empty]
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in _flat(notes)]
    return ["| | |", "|---|---|", *rows]


def _flat(notes: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested notes as rows, `config.epochs`."""
    rows: list[tuple[str, Any]] = []
    for key, value in notes.items():
        name = f"{before}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.5g}"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_cell, value))
    else:
        text = str(value)
    # A bar or a line break would end the cell.
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= CELL else text[: CELL - 2] + ".."
