"""Launches the toy kernels under the stub driver, in a process of its own, and prints what happened.

`python launch_toys.py ARCH`; JSON: for every row whether its kernel was found and not compiled, and
the names of the launched kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import toy_launches
from coded_resnext.kernels.prebuilt_cache import install
from coded_resnext.kernels.stub_driver import install_stub_driver
from triton import knobs


def launch(row: toy_launches.Row) -> bool:
    """Launch a row as a wrapper does; whether the kernel was there."""
    hits: list[bool] = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    tensors: list[Any] = [
        torch.zeros(64) if isinstance(value, str) else value for value in row.args
    ]
    row.function()[(1,)](*tensors, **row.keywords)
    return all(hits)


if __name__ == "__main__":
    driver = install_stub_driver(sys.argv[1])
    install()
    found = {name: launch(row) for name, row in toy_launches.rows(sys.argv[1])}
    print(json.dumps({"found": found, "launches": driver.launches}))
