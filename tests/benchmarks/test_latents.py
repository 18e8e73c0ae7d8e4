"""The benchmark of shuffled reads, on few rows: the storages hold the same, and the report says what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.latents import check_equal, measure


def test_report_has_every_storage(tmp_path: Path) -> None:
    result = measure(images=64, slow_images=32, batch_size=16, rounds=1, folder=tmp_path)
    assert result["rows"] == {"numpy.memmap": 128, "shards": 128, "arrow binary": 64, "arrow arrays": 64}
    rates = result["samples_per_second"]
    shares = result["share_of_memmap"]
    assert shares["median"] == pytest.approx(rates["shards"]["median"] / rates["numpy.memmap"]["median"], rel=1e-2)
    assert result["growth_of_memory_bytes"] < 1 << 26


def test_storage_that_returns_something_else_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="wrong"):
        check_equal({"wrong": lambda items, sides: np.zeros((len(items), 8, 32, 32), np.float16)}, 8)
