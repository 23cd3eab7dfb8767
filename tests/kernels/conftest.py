"""What the tests of kernels share: guarded memory, and the device that they run on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.guarded_memory import GuardedMemory, guarded_memory
from triton.runtime.interpreter import InterpreterBuilder

from coded_resnext.kernels import layout

# What Triton's interpreter lacks in some of the supported versions, and in which. Methods that
# other versions call for what these do in another way (`create_fneg`, `get_cache_policy`) are none.
LACKING = {
    "create_advance": "3.8 and 3.9",
    "create_make_block_ptr": "3.8 and 3.9",
    "create_dot_scaled": "3.6 and 3.7",
    "create_approx_divf": "3.6 to 3.8",
    "create_atomic_load": "3.6 to 3.8",
    "create_atomic_poll": "3.6 to 3.8",
    "create_atomic_store": "3.6 to 3.8",
    "get_bf16": "3.6 to 3.8",
}


@pytest.fixture(autouse=True)
def _common_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on what the interpreters of all supported versions have in common."""

    def refuse(name: str, real: Any) -> Any:
        def method(builder: Any, *arguments: Any) -> Any:
            # A 0 is made without a method for its dtype where there is none.
            if name == "get_bf16" and arguments == (0,):
                return real(builder, *arguments)
            raise AttributeError(f"{name}: Triton's interpreter lacks it in {LACKING[name]}")

        return method

    for name in LACKING:
        if (real := getattr(InterpreterBuilder, name, None)) is not None:
            monkeypatch.setattr(InterpreterBuilder, name, refuse(name, real))


@pytest.fixture
def memory() -> Iterator[GuardedMemory]:
    """Guards the tensors that operators allocate during the test, and checks them at its end."""
    with guarded_memory() as guarded:
        yield guarded


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: on the CPU, in Triton's interpreter."""
    assert layout.interpreted(), "TRITON_INTERPRET=1 was not set before Triton was imported"
    return torch.device("cpu")
