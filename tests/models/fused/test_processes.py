"""The fused data flow on two processes: DistributedDataParallel and SyncBatchNorm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.small_networks import make_images
from support.two_fused_processes import BATCH, network, step

SCRIPT = Path(__file__).parents[2] / "support" / "two_fused_processes.py"


@pytest.mark.long
def test_two_halves_are_the_whole_batch(tmp_path: Path) -> None:
    """Statistics of all samples, and gradients through them, on both processes."""
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True)
    model = network()
    expected = step(model, model, make_images(BATCH, seed=4).double())
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(actual) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-10, msg=name)
