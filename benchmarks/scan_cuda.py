"""Time the scan on a GPU: everything benchmarks/scan.py times, on CUDA events, and the same calls from a CUDA graph.

    python -m benchmarks.scan --device cuda --json benchmarks/results/scan_cuda.json

Each run lies between two events on one stream, in turn with a copy that is larger than the caches: the share of that
copy's bandwidth, the per-line PyTorch loop (the reference) and attention at equal tokens and width come from one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import scan_cases
from benchmarks.measure import CpuDevice, Timing
from gspn_dit.errors import UserError
from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.cuda.binding import describe, problem

SHAPES = ((32, 16, 16, 1152), (32, 16, 16, 1500), (32, 16, 16, 900), (8, 32, 32, 1152), (1, 128, 128, 256))
LARGE_SHAPES = ((1, 1024, 1024, 64), (16, 1024, 1024, 8))
"""Timed from graphs alone: what the PyTorch loop keeps for its backward pass would not fit. The second is GSPN-2's."""


class CudaDevice(CpuDevice):
    """Times work on the current GPU."""

    name = "cuda"
    needs_own_process = False

    def time_together(self, runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
        """Time several functions in turn between events; two warm-ups each, the first of which compiles.

        Processor seconds are the host's, until the launch returns.
        """
        for run in (*runs.values(), *runs.values()):
            run()
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        host: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                began = time.process_time()
                run()
                host[name].append(max(time.process_time() - began, 1e-9))
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: Timing(tuple(1e-3 * start.elapsed_time(end) for start, end in pairs), tuple(host[name]))
            for name, pairs in events.items()
        }

    def peak_extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Return how far torch's allocations rise during a run."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before

    def describe(self) -> dict[str, object]:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "processor": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "instruction_sets": [f"sm_{properties.major}{properties.minor}"],
            "cuda": torch.version.cuda,
            "kernels": describe(),
        }


def graph_times(benchmark: scan_cases.Benchmark, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Time forward, and forward with backward, replayed from a CUDA graph: the kernels without their launches."""
    inputs = scan_cases.make_inputs(shape, 4, shape[3], dtype, benchmark.device.name)
    grad_y = torch.randn_like(inputs[0])

    def forward() -> object:
        return gspn_scan(*inputs, backend=benchmark.backend)

    def both() -> object:
        return scan_cases.forward_backward(inputs, DIRECTIONS, benchmark.backend, grad_y)

    replays: dict[str, Callable[[], object]] = {}
    for name, run in (("forward", forward), ("forward_backward", both)):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            run()
        replays[name] = graph.replay
    times = benchmark.device.time_together({"copy": benchmark.copy, **replays}, benchmark.repeats)
    moved = {"forward": scan_cases.scan_bytes(shape, 4, shape[3], dtype, False)}
    moved["forward_backward"] = moved["forward"] + scan_cases.scan_bytes(shape, 4, shape[3], dtype, True)
    copied_per_second = benchmark.copy_bytes / times["copy"].best
    shares = {
        name: {**times[name].as_json(), "share_of_copy": round(moved[name] / times[name].best / copied_per_second, 3)}
        for name in replays
    }
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), **shares}


def run(quick: bool, repeats: int) -> dict[str, Any]:
    """Return the report of benchmarks/scan.py for this GPU, with the times of graphs."""
    reason = problem()
    if reason is not None:
        raise UserError(f"the scan cannot be timed on a GPU: {reason}")
    shapes = scan_cases.QUICK_SHAPES if quick else SHAPES
    scan_cases.DEVICES["cuda"] = CudaDevice
    report = scan_cases.run("cuda", quick, repeats, shapes)
    benchmark = scan_cases.Benchmark(CudaDevice(), repeats, quick)
    report["graphs"] = []
    for shape in shapes if quick else (*shapes, *LARGE_SHAPES):
        report["graphs"].append(graph_times(benchmark, shape, torch.bfloat16))
        scan_cases.say(f"{report['graphs'][-1]}")
    return report
