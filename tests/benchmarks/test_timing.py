"""Named GPUs: found by the driver's name, and what follows from their rates."""

from __future__ import annotations

import pytest
from timing import GPUS, find_gpu


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_gpu_is_found_by_its_driver_name(device: str, name: str) -> None:
    gpu = find_gpu(device)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "device", ["NVIDIA H20", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "NVIDIA RTX A1000"]
)
def test_another_one_is_not_taken_for_it(device: str) -> None:
    assert find_gpu(device) is None


def test_what_an_h200_can_issue_and_move() -> None:
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200")
    # 132 processors, four instructions a clock at 1.98 GHz, 4.8 TB/s.
    assert gpu.issue_per_byte == pytest.approx(0.2178)
    assert gpu.floor(4.8e12) == pytest.approx(1.0)
