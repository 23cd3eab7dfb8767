"""What the tests of the experiments share."""

from __future__ import annotations

import pytest
from support.small_networks import make_data, make_network

from coded_resnext import CodedResNeXt
from coded_resnext.data.batches import Batches


@pytest.fixture
def network() -> CodedResNeXt:
    """Four classes; three coded blocks of two codebooks with a plain block between them."""
    return make_network()


@pytest.fixture
def data(network: CodedResNeXt) -> Batches:
    """50 images in batches of 16; all four classes occur."""
    loader = make_data(network, 50, seed=1)
    assert loader.targets.bincount(minlength=4).min() > 3
    return loader
