"""What training launches is what is built ahead of time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import needs_triton

from coded_resnext import create_model
from coded_resnext.kernels.build.build import shipped_rows
from coded_resnext.kernels.conv1x1 import convolution
from coded_resnext.kernels.conv1x1 import launch as conv1x1_launch
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.recompute import launch as recompute_launch
from coded_resnext.kernels.rows import LaunchRow
from coded_resnext.models.fused import block as fused_block


def of_a_step(arch: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> set[LaunchRow]:
    """Rows that a step of the ImageNet network in bfloat16 launches; nothing is computed here."""
    launched: set[LaunchRow] = set()
    monkeypatch.setattr(LaunchRow, "launch", lambda row, *_: launched.add(row))
    monkeypatch.setattr(fused_block, "_pointwise", lambda *_: True)
    # What a tensor on that GPU would make of its variant, on a machine that has none.
    for module in (conv1x1_launch, recompute_launch):
        of_cpu = module.variant_of
        monkeypatch.setattr(
            module, "variant_of", lambda *a, of=of_cpu, **k: replace(of(*a, **k), arch=arch)
        )
    planned = conv1x1_rows.planned
    monkeypatch.setattr(convolution, "planned", lambda _, sizes: planned(arch, sizes))
    model = create_model("coded_resnext50_32x4d", backend=backend).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *_ = model(torch.zeros(2, 3, 32, 32))
    y.float().square().sum().backward()
    return launched


@needs_triton
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_rows_of_1x1_convolutions_are_those_of_a_step(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more and no less."""
    shipped = {
        row for name, row in shipped_rows(arch) if name.startswith("1x1") and "folded" not in name
    }
    launched = of_a_step(arch, "triton", monkeypatch)
    assert shipped == {row for row in launched if row.kernel.startswith(("conv1x1.", "recompute."))}
    assert len(shipped) >= 5


@needs_triton
@pytest.mark.parametrize("backend", ["fused", "triton"])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
def test_what_stands_around_products_is_built(
    arch: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {
        row
        for row in of_a_step(arch, backend, monkeypatch)
        if row.kernel.startswith(
            (
                *("residual.", "batch_norm.", "recompute.moments:activation"),
                *("conv3x3.weight:pack", "conv3x3.weight:reduce"),
            )
        )
    }
    assert launched <= {row for _, row in shipped_rows(arch)}
    assert len(launched) > 10
