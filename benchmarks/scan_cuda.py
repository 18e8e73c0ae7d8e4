"""Time the scan on a GPU: everything benchmarks/scan.py times, on CUDA events, and the same calls from a CUDA graph.

    python benchmarks/scan_cuda.py --json benchmarks/results/scan_cuda.json

Each run lies between two events on one stream, in turn with a copy that is larger than the caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import scan
from benchmarks.measure import CpuDevice, Timing
from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.cuda import problem

SHAPES = ((32, 16, 16, 1152), (32, 16, 16, 1500), (8, 32, 32, 1152), (1, 128, 128, 256), (1, 1024, 1024, 64))


class CudaDevice(CpuDevice):
    """Times work on the current GPU."""

    name = "cuda"

    def time_together(self, runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
        """Time several functions in turn between events; two warm-ups each, the first of which compiles."""
        for run in (*runs.values(), *runs.values()):
            run()
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: Timing(tuple(1e-3 * start.elapsed_time(end) for start, end in pairs))
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
            "cuda": torch.version.cuda,
        }


def graph_times(device: CudaDevice, shape: Sequence[int], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time forward, and forward with backward, replayed from a CUDA graph: what the launches themselves cost."""
    inputs = scan.make_inputs(shape, 4, shape[3], dtype, "cuda")
    grad_y = torch.randn_like(inputs[0])

    def forward() -> object:
        return gspn_scan(*inputs, backend="cupy")

    def both() -> object:
        return scan.forward_backward(inputs, DIRECTIONS, "cupy", grad_y)

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
    times = device.time_together({"copy": torch.empty(1 << 26, device="cuda").clone, **replays}, repeats)
    return {"shape": list(shape), **{name: times[name].as_json() for name in replays}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--repeats", type=int, default=20, help="runs per figure")
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE instead of standard output")
    arguments = parser.parse_args()
    reason = problem()
    if reason is not None:
        raise SystemExit(f"scan_cuda: error: {reason}")
    scan.DEVICES["cuda"] = CudaDevice
    if not arguments.quick:
        scan.SHAPES = SHAPES  # type: ignore[assignment]
    report = scan.run("cuda", arguments.quick, arguments.repeats)
    shapes = scan.QUICK_SHAPES if arguments.quick else SHAPES
    report["graphs"] = [graph_times(CudaDevice(), shape, torch.bfloat16, arguments.repeats) for shape in shapes]
    text = json.dumps(report, indent=1)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
