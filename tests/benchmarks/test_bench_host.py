"""What a training step costs the host: milliseconds of small networks, and launches."""

from __future__ import annotations

import bench_host
import pytest
from support.helpers import needs_triton

SMALL = {"coded": "coded_resnext14_32x1d", "plain": "resnext14_32x1d"}
# Counted with torch 2.14.1: 536, 663 and 1777. Other versions take some calls apart otherwise.
MOST = {
    ("coded_resnext50_32x4d", "triton"): 550,
    ("resnext50_32x4d", "triton"): 680,
    ("coded_resnext50_32x4d", "torch"): 1830,
}


@needs_triton
@pytest.mark.long
def test_every_way_has_a_row() -> None:
    """The driver that launches nothing is asked for the kernels that `launches_of_step` counts."""
    rows = {row["way"]: row for row in bench_host.measure(SMALL, rounds=1)}
    assert rows.keys() == {*bench_host.WAYS, *bench_host.CAPTURED.values()}
    for way, (network, backend) in bench_host.WAYS.items():
        counted = bench_host.launches_of_step(SMALL[network], backend, batch=2, size=32)
        kernels = sum(n for (_, name), n in counted.items() if name.startswith("triton "))
        assert rows[way]["kernels"] == kernels
        assert (kernels > 50) == (backend == "triton")
        assert rows[way]["operators"] > counted.total() - kernels
        assert 0 < rows[way]["host_ms"] < rows[way]["step_ms"]


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(("network", "backend"), MOST, ids=" ".join)
def test_a_step_takes_no_more_launches(network: str, backend: str) -> None:
    counted = bench_host.launches_of_step(network, backend)
    assert counted.total() <= MOST[network, backend], bench_host.table(counted, 20)
    # One for each layer of a block, forward and backward, or in that of a product not stored.
    for own, of_product in (
        ("batch_norm", "product_statistics"),
        ("batch_norm_backward", "weight_gradients"),
    ):
        names = (f"triton {own}", f"triton {of_product}")
        by_kernels = sum(n for (_, name), n in counted.items() if name in names)
        assert by_kernels == (52 if backend == "triton" else 0)
    assert not any(line.endswith(":update_running") for line, _ in counted) or backend == "torch"


@needs_triton
def test_a_launch_more_is_counted() -> None:
    """At a small size: the count follows shapes, not values."""
    few = bench_host.launches_of_step("coded_resnext14_32x1d", "triton", batch=2, size=32)
    assert any(name == "triton batch_norm_backward" for _, name in few)
    assert any(line.startswith("kernels/") for line, _ in few)
    assert few == bench_host.launches_of_step("coded_resnext14_32x1d", "triton", batch=4, size=32)
