"""Uninitialised memory is filled with NaN in every test of the scan, and `backend` runs through all CPU code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gspn_dit.ops.cpu import binding as cpu


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill `torch.empty` and its relatives, C++ ones included, so that an element nobody writes is found."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


AVAILABLE = cpu.available_kernels()
BACKENDS = [
    "reference",
    *(pytest.param(f"cpu, {name}", marks=pytest.mark.slow) for name in AVAILABLE[1:-1]),
    *dict.fromkeys((f"cpu, {AVAILABLE[-1]}", "cpu, pytorch")),
]
"""The reference, and the CPU backend with all kernels that this machine has: the fastest, those for any, and others."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend."""
    name, _, kernels = str(request.param).partition(", ")
    if kernels:
        monkeypatch.setenv(cpu.KERNELS_VARIABLE, kernels)
    return name
