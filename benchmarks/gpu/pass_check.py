"""Whether the passes of a layer are right and repeat their bits, for the parts of check.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conv3x3 import ROUNDING, error

from coded_resnext.kernels.rows import ALL_PASSES, NO_PASSES

# Who computes.
KERNELS, PYTORCH = ALL_PASSES, NO_PASSES


def check_call(call: Any, passes: Sequence[str], repeats: int) -> dict[str, Any]:
    """Errors of the passes beside those of PyTorch's products, and whether bits repeat.

    Args:
        call: a layer's tensors in a dtype. `run(pass, passes)` gives tensors by name, `wide()` is
            the same in float64.
        passes: what `run` takes.
        repeats: how often each is run by the kernels.
    """
    name, dtype = call.layer.name, call.x.dtype
    row: dict[str, Any] = {"layer": name, "dtype": str(dtype), "errors": {}, "wrong": []}
    for which in passes:
        exact, eager = call.wide().run(which, PYTORCH), call.run(which, PYTORCH)
        actual = call.run(which, KERNELS)
        for result, value in exact.items():
            mine, theirs = error(actual[result], value), error(eager[result], value)
            limit = 2 * max(theirs, ROUNDING[dtype])
            row["errors"][f"{which} {result}"] = {"kernel": mine, "eager": theirs, "limit": limit}
            # Written so that a NaN is wrong.
            if not mine <= limit:
                fault = f"{name} {which} {result}: error {mine:.1e}, at most {limit:.1e}"
                row["wrong"].append(fault)
        for _ in range(repeats - 1):
            again = call.run(which, KERNELS)
            if not all(torch.equal(value, again[result]) for result, value in actual.items()):
                row["wrong"].append(f"{name} {which}: other bits in one of {repeats} runs")
                break
    return row
