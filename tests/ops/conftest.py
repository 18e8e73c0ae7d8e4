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


@pytest.fixture(params=["reference", "cpu", "cpu, line by line"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend: the reference, the CPU kernels that run here, the ones for machines without a compiler."""
    if request.param == "cpu, line by line":
        monkeypatch.setenv(cpu.KERNELS_VARIABLE, "pytorch")
    return str(request.param).split(",")[0]
