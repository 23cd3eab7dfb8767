"""What a training step launches on a GPU, counted without one."""

from __future__ import annotations

import launches
import pytest
from support.helpers import needs_triton

# Counted with torch 2.14.1: 536, 663 and 1777. Other versions take some calls apart otherwise.
MOST = {
    ("coded_resnext50_32x4d", "triton"): 550,
    ("resnext50_32x4d", "triton"): 680,
    ("coded_resnext50_32x4d", "torch"): 1830,
}


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(("network", "backend"), MOST, ids=" ".join)
def test_a_step_takes_no_more_launches(network: str, backend: str) -> None:
    counted = launches.launches_of_step(network, backend)
    assert counted.total() <= MOST[network, backend], launches.table(counted, 20)
    # One for each layer of a block, forward and backward, or in that of a product not stored.
    for own, of_product in (
        ("batch_norm", "product_statistics"),
        ("batch_norm_backward", "weight_gradients"),
    ):
        names = (f"triton {own}", f"triton {of_product}")
        by_kernels = sum(n for (_, name), n in counted.items() if name in names)
        assert by_kernels == (52 if backend == "triton" else 0)
    assert not any(place.endswith(":update_running") for place, _ in counted) or backend == "torch"


@needs_triton
def test_a_launch_more_is_counted() -> None:
    """At a small size: the count follows shapes, not values."""
    few = launches.launches_of_step("coded_resnext14_32x1d", "triton", batch=2, size=32)
    assert any(name == "triton batch_norm_backward" for _, name in few)
    assert any(place.startswith("kernels/") for place, _ in few)
    assert few == launches.launches_of_step("coded_resnext14_32x1d", "triton", batch=4, size=32)
