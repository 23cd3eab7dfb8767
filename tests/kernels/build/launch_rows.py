"""Launches rows under the stub driver, in a process of its own, and prints what happened.

`python launch_rows.py ARCH MODULE:FUNCTION [ENDING ...]`, for rows whose names have these endings.
JSON: for every row whether its kernel was found and not compiled, and the names of the launched
kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton import knobs

from coded_resnext.kernels.build.build import load_rows
from coded_resnext.kernels.build.steps import install_stub_driver
from coded_resnext.kernels.layout import POINTERS
from coded_resnext.kernels.prebuilt import install


def launch(row: Any) -> bool:
    """Launch a row as an operator does, on tensors; whether the kernel was there."""
    hits: list[bool] = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    args = [
        torch.zeros(64, dtype=POINTERS[value[1:]]) if isinstance(value, str) else value
        for value in row.args
    ]
    row.launch((1,), *args)
    return all(hits)


if __name__ == "__main__":
    driver = install_stub_driver(sys.argv[1])
    install()
    endings = tuple(sys.argv[3:])
    rows = {
        name: row
        for name, row in load_rows(sys.argv[2], sys.argv[1])
        if not endings or name.endswith(endings)
    }
    actual = {name: launch(row) for name, row in rows.items()}
    print(json.dumps({"found": actual, "launches": driver.launches}))
