"""What a training step launches on a GPU, counted without one."""

from __future__ import annotations

import launches
import pytest
from support.helpers import needs_triton

# Counted with torch 2.14.1: 642, 758 and 1768. Other versions take some calls apart otherwise.
MOST = {
    ("coded_resnext50_32x4d", "triton"): 655,
    ("resnext50_32x4d", "triton"): 775,
    ("coded_resnext50_32x4d", "torch"): 1830,
}


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(("network", "backend"), MOST, ids=" ".join)
def test_a_step_takes_no_more_launches(network: str, backend: str) -> None:
    counted = launches.launches_of_step(network, backend)
    assert counted.total() <= MOST[network, backend], launches.table(counted, 20)
    by_kernels = sum(n for (_, name), n in counted.items() if name == "triton batch_norm")
    # One for each layer of a block forward, and one backward.
    assert by_kernels == (52 if backend == "triton" else 0)


@needs_triton
def test_a_launch_more_is_counted() -> None:
    """At a small size: the count follows shapes, not values."""
    few = launches.launches_of_step("coded_resnext14_32x1d", "triton", batch=2, size=32)
    assert any(name == "triton batch_norm_backward" for _, name in few)
    assert any(place.startswith("kernels/") for place, _ in few)
    assert few == launches.launches_of_step("coded_resnext14_32x1d", "triton", batch=4, size=32)
