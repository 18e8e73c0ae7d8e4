"""The scan's benchmark: its byte counts, its correctness gate, and a report from tiny shapes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import scan_cases
from benchmarks.measure import FEWEST_ROUNDS, CpuDevice, Timing
from gspn_dit.ops import DIRECTIONS
from gspn_dit.ops.cpu import binding as cpu


def test_fewest_bytes() -> None:
    shape = (2, 3, 4, 8)
    elements = 2 * 3 * 4 * 8
    assert scan_cases.scan_bytes(shape, 4, 8, torch.float32, backward=False) == 22 * 4 * elements
    assert scan_cases.scan_bytes(shape, 4, 8, torch.float32, backward=True) == 43 * 4 * elements
    elements_moved = 2 + 2 * (3 / 8 + 2)
    assert scan_cases.scan_bytes(shape, 2, 1, torch.bfloat16, backward=False) == int(elements_moved * 2 * elements)


def test_no_figure_while_the_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan_cases.correctness_error("cpu", "cpu") is None
    right = cpu.scan_forward
    monkeypatch.setattr(cpu, "scan_forward", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(SystemExit, match="kernels are wrong"):
        scan_cases.run("cpu", quick=True, repeats=1)


def test_report_of_a_tiny_shape() -> None:
    benchmark = scan_cases.Benchmark(CpuDevice(), repeats=2, quick=True)
    row = benchmark.shape((1, 4, 4, 16), DIRECTIONS, torch.float32)
    assert row["forward"]["share_of_copy"] >= 0  # rounded, and tiny on a busy machine
    assert row["backward"]["median_ms"] >= row["backward"]["best_ms"] > 0
    reference = benchmark.reference((1, 4, 4, 16))
    assert reference["times_faster"] > 0
    assert reference["returned_bytes"] == 22 * 4 * 4 * 4 * 16
    reads = benchmark.reads((1, 4, 4, 16))
    assert [reads[name]["run_bytes"] for name in ("logits", "gate")] == [3 * 16 * 4, 16 * 4]
    assert reads["logits"]["in_runs_over_in_order"] > 0
    assert benchmark.attention((1, 4, 4, 64))["attention_is_extrapolated_from_queries"] is None
    mixers = benchmark.mixers((1, 4, 4, 64))
    assert list(mixers["ms"]) == list(scan_cases.MIXERS)
    assert mixers["times_as_fast_as_gspn"]["gspn"] == 1.0


def test_no_whole_attention_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cases, "ATTENTION_TOKENS", 15)
    row = scan_cases.Benchmark(CpuDevice(), repeats=1, quick=True).mixers((1, 4, 4, 64))
    assert row["left_out"] == ["attention"]
    assert set(row["ms"]) == {*scan_cases.MIXERS} - {"attention"}


def test_rounds_end_with_the_time() -> None:
    calls: list[int] = []
    times = CpuDevice(0.0).time_together({"a": lambda: calls.append(1)}, repeats=20)
    assert len(times["a"].seconds) == FEWEST_ROUNDS == len(calls) - 1  # and the warm-up
    assert len(CpuDevice(0.0).time_together({"a": lambda: None}, repeats=2)["a"].seconds) == 2


def test_memory_beyond_the_results() -> None:
    report = scan_cases.memory_report(120, 200, 100)
    assert report == {"returned_bytes": 100, "memory_ratio": 0.2, "memory_ratio_with_results": 0.6}
    assert scan_cases.memory_report(None, 200, 100)["memory_ratio"] is None
    assert scan_cases.memory_report(90, 100, 100)["memory_ratio"] is None


@pytest.mark.slow
def test_peak_of_a_fresh_process_holds_the_results() -> None:
    shape = (1, 64, 64, 128)
    peak = scan_cases.peak_in_own_process("cpu", shape)
    assert peak is not None
    assert scan_cases.returned_bytes(shape) * 0.95 < peak < scan_cases.returned_bytes(shape) * 1.5


def test_timing() -> None:
    timing = Timing((0.002, 0.001, 0.004), (0.003, 0.002, 0.002))
    assert timing.as_json() == {"best_ms": 1.0, "median_ms": 2.0, "spread": 1.0, "cpu_ms": 2.0}
