"""The GPU's benchmark of the scan with a CPU in the GPU's place: every figure of the report, from tiny shapes."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator

import pytest
import torch

from benchmarks import scan_cases, scan_cuda
from gspn_dit.errors import UserError


class FakeEvent:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.milliseconds = 0.0

    def record(self) -> None:
        self.milliseconds = 1e3 * time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.milliseconds - self.milliseconds


class FakeGraph:
    """A CUDA graph that counts its replays."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1
        time.sleep(1e-4)


@contextlib.contextmanager
def _context(*arguments: object, **options: object) -> Iterator[None]:
    yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose GPU is its CPU."""
    properties = types.SimpleNamespace(name="none", multi_processor_count=1, total_memory=1, major=9, minor=0)
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": lambda: types.SimpleNamespace(synchronize=lambda: None),
        "stream": _context,
        "graph": _context,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 300,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(scan_cuda, "problem", lambda: None)
    monkeypatch.setattr(scan_cuda, "describe", lambda: "kernels")
    monkeypatch.setattr(scan_cuda.CudaDevice, "name", "cpu")
    monkeypatch.setattr(scan_cases, "QUICK_SHAPES", ((1, 4, 4, 64),))
    monkeypatch.setattr(scan_cases, "COPY_ELEMENTS", 1 << 16)
    monkeypatch.setattr(scan_cases, "SCALING_TOKENS", 1 << 12)
    monkeypatch.setattr(scan_cases, "correctness_error", lambda device, backend: None)  # tested in test_scan.py
    monkeypatch.setitem(scan_cases.DEVICES, "cuda", scan_cuda.CudaDevice)
    return monkeypatch


def test_report(gpu: pytest.MonkeyPatch) -> None:
    FakeGraph.replays = 0
    report = scan_cuda.run(quick=True, repeats=2)
    assert report["device"]["multiprocessors"] == 1
    assert {row["dtype"] for row in report["shapes"]} == {"float32", "bfloat16"}
    for row in report["shapes"]:
        assert row["forward"]["best_ms"] > 0
        assert row["backward"]["share_of_copy"] > 0
    assert report["reference"][0]["peak_extra_bytes"] == {"cpu": 200, "reference": 200}
    assert report["attention"][0]["times_faster"] > 0
    (graph,) = report["graphs"]
    assert graph["forward"]["best_ms"] >= 0.1
    assert FakeGraph.replays == 2 * (2 + 2)  # forward and both: two warm-ups and two repeats each


def test_shares_divide_by_the_same_runs_copy(gpu: pytest.MonkeyPatch) -> None:
    """Twice the bytes of a copy in twice its time is its bandwidth."""
    benchmark = scan_cases.Benchmark(scan_cuda.CudaDevice(), repeats=1, quick=True)
    copy, timing = scan_cases.Timing((0.001,), (1.0,)), scan_cases.Timing((0.002,), (1.0,))
    assert benchmark._share(timing, copy, 2 * benchmark.copy_bytes)["share_of_copy"] == 1.0


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cuda, "problem", lambda: "PyTorch sees no CUDA device")
    with pytest.raises(UserError, match=r"^the scan cannot be timed on a GPU: PyTorch sees no CUDA device$"):
        scan_cuda.run(quick=True, repeats=1)
