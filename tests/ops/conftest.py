"""Every test of the scan runs with uninitialised memory filled with NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill `torch.empty` and its relatives, C++ ones included, so that an element nobody writes is found."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
