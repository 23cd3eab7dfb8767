"""Launches the toy kernels under the stub driver, in a process of its own, and prints what happened.

`python launch_toys.py ARCH`; JSON: for every row whether its kernel was found and not compiled, the
names of the launched kernels, and every kernel's cache key for two orders of hashing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import toy_launches
from coded_resnext.kernels.prebuilt_cache import prepare, settle_keys
from coded_resnext.kernels.stub_driver import install_stub_driver
from triton import knobs


def launch(row: toy_launches.Row) -> bool:
    """Launch a row as a wrapper does; whether the kernel was there."""
    hits: list[bool] = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    kernel = getattr(toy_launches, row.kernel.partition(":")[2])
    prepare(kernel)
    tensors: list[Any] = [
        torch.zeros(64) if isinstance(value, str) else value for value in row.arguments
    ]
    kernel[(1,)](*tensors, **row.constants, **row.options)
    return all(hits)


def keys(order: list[Any]) -> list[str]:
    """The cache keys of the kernels after hashing them anew in an order."""
    functions = [toy_launches._activate, toy_launches.scale_kernel, toy_launches.sum_kernel]
    for function in functions:
        function.hash = None
        function.used_global_vals = {}
    for kernel in order:
        settle_keys(kernel)
    return [function.cache_key for function in functions]


if __name__ == "__main__":
    driver = install_stub_driver(sys.argv[1])
    found = {row.name: launch(row) for row in toy_launches.rows()}
    kernels = [toy_launches.scale_kernel, toy_launches.sum_kernel]
    print(
        json.dumps(
            {
                "found": found,
                "launches": driver.launches,
                "keys": [keys(kernels), keys([*reversed(kernels)])],
            }
        )
    )
