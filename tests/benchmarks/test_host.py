"""Time of the host for a training step, of small networks."""

from __future__ import annotations

import bench_host
import launches
import pytest
from support.helpers import needs_triton

SMALL = {"coded": "coded_resnext14_32x1d", "plain": "resnext14_32x1d"}


@needs_triton
@pytest.mark.long
def test_every_way_has_a_row() -> None:
    """The driver that launches nothing is asked for the kernels that `launches.py` counts."""
    rows = {row["way"]: row for row in bench_host.measure(SMALL, rounds=1)}
    assert rows.keys() == bench_host.WAYS.keys()
    for way, (network, backend) in bench_host.WAYS.items():
        counted = launches.launches_of_step(SMALL[network], backend, batch=2, size=32)
        kernels = sum(n for (_, name), n in counted.items() if name.startswith("triton "))
        assert rows[way]["kernels"] == kernels
        assert (kernels > 50) == (backend == "triton")
        assert rows[way]["operators"] > counted.total() - kernels
        assert 0 < rows[way]["host_ms"] < rows[way]["step_ms"]
