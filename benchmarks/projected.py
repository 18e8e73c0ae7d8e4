"""Time and weigh the fused projected scan in turn with the same scan whose logits and gates go through memory.

    python -m benchmarks.projected --out benchmarks/results/projected.json

Both run their kernels alone, without autograd's bookkeeping: forward, and forward with backward. Peak memory is how far
the resident memory of a fresh process rises above the inputs, results included. Nothing is printed unless both ways
agree first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import CpuDevice, software
from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.ops.cpu import binding, projected
from gspn_dit.ops.materialised import projected_backward, projected_forward

CASES = (
    # shape, groups (None: one per channel), dtype
    ((16, 16, 16, 384), None, torch.float32),
    ((1, 64, 64, 384), None, torch.float32),
    ((8, 16, 16, 1152), None, torch.float32),
    ((16, 16, 16, 384), 8, torch.float32),
    ((16, 16, 16, 384), None, torch.bfloat16),
)
QUICK_CASES = (((1, 8, 8, 48), None, torch.float32), ((2, 8, 8, 48), 3, torch.bfloat16))
WAYS = ("fused", "through memory")
CODES = [0, 1, 2, 3]
PROXY_RATIO = 16
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_inputs(shape: Sequence[int], groups: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Return x, the proxy, the three weights and the merge weight; logits and gates have size one."""
    *grid, channels = shape
    width = max(1, channels // PROXY_RATIO)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    rows = (len(CODES) * 3 * (groups or channels), len(CODES) * channels, len(CODES) * channels)
    weights = [draw(count, width, scale=width**-0.5) for count in rows]
    return [draw(*shape), draw(*grid, width), *weights, torch.ones(len(CODES))]


def runners(inputs: list[Tensor], way: str) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    """Return functions that run the forward, and forward and backward: y, then the gradients."""
    x, proxy, *weights, merge = inputs

    def forward() -> Tensor:
        if way == "fused":
            return projected.scan_forward(x, proxy, weights, merge, None, CODES, 0)
        return projected_forward(binding.scan_forward, x, proxy, weights, merge, None, CODES, 0)

    def both() -> list[Tensor]:
        y = forward()
        if way == "fused":
            gradients = projected.scan_backward(y, x, proxy, weights, merge, None, CODES, 0)
        else:
            gradients = projected_backward(binding.scan_backward, y, x, proxy, weights, merge, None, CODES, 0)
        return [y, *gradients[:6]]

    return forward, both


def disagreement(inputs: list[Tensor]) -> str | None:
    """Return a sentence about the first tensor in which the two ways differ, or None."""
    names = ("y", "x", "proxy", "logits", "input gate", "output gate", "merge")
    for name, *pair in zip(names, *(runners(inputs, way)[1]() for way in WAYS), strict=True):
        one, other = (tensor.double() for tensor in pair)
        error = float((one - other).norm() / other.norm())
        if not error <= TOLERANCES[inputs[0].dtype]:
            return f"{name} differs by {error:.1e} at {list(inputs[0].shape)}, {inputs[0].dtype}"
    return None


def peak_here(case: int, quick: bool, way: str, backward: bool) -> int | None:
    """Return the peak extra bytes of one case in this process."""
    runners(make_inputs((1, 2, 2, 16), None, torch.float32), way)[1]()  # loads what the first call loads
    run = runners(make_inputs(*(QUICK_CASES if quick else CASES)[case]), way)[backward]
    return CpuDevice().peak_extra_bytes(run)


def _peak(case: int, quick: bool, way: str, backward: bool) -> int | None:
    command = [sys.executable, "-m", "benchmarks.projected", "--peak-of", json.dumps([case, quick, way, backward])]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, cwd=root)
    value: int | None = json.loads(result.stdout)
    return value


def measure(case: int, quick: bool, repeats: int) -> dict[str, Any]:
    """Time one case both ways in turn and weigh both in processes of their own."""
    shape, groups, dtype = (QUICK_CASES if quick else CASES)[case]
    inputs = make_inputs(shape, groups, dtype)
    if problem := disagreement(inputs):
        raise UserError(f"no figures, the kernels are wrong: {problem}")
    row: dict[str, Any] = {"shape": list(shape), "groups": groups or shape[3], "dtype": str(dtype).split(".")[1]}
    for backward, name in enumerate(("forward", "forward_backward")):
        runs: dict[str, Callable[[], object]] = {way: runners(inputs, way)[backward] for way in WAYS}
        times = CpuDevice().time_together(runs, repeats)
        peaks = [_peak(case, quick, way, bool(backward)) for way in WAYS]
        row[name] = {
            **{way: timing.as_json() for way, timing in times.items()},
            "times_faster": round(times[WAYS[1]].median / times[WAYS[0]].median, 3),
            "peak_extra_bytes": dict(zip(WAYS, peaks, strict=True)),
            "memory_ratio": round(peaks[0] / peaks[1], 3) if peaks[0] is not None and peaks[1] else None,
        }
    return row


def run(quick: bool, repeats: int) -> dict[str, Any]:
    """Measure all cases; raises UserError where the two ways differ or the fused kernels cannot run."""
    if not projected.fused(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)):
        raise UserError(f"the fused kernels do not run here: {binding.describe()}")
    report: dict[str, Any] = {"device": CpuDevice().describe(), "software": software(), "repeats": repeats, "cases": []}
    for case in range(len(QUICK_CASES if quick else CASES)):
        report["cases"].append(measure(case, quick, repeats))
        row = report["cases"][-1]
        figures = " ".join(
            f"{name} {row[name]['times_faster']}× memory {row[name]['memory_ratio']}"
            for name in ("forward", "forward_backward")
        )
        print(f"{row['shape']} {row['groups']} groups {row['dtype']}: {figures}", file=sys.stderr, flush=True)
    report["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    return report


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the report to this file, else to standard output")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; the ratios are of medians")
    parser.add_argument("--peak-of", help="JSON: case, quick, way, backward; print its peak alone")
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps(peak_here(*json.loads(options.peak_of))))
        return
    publish(run(options.quick, options.repeats), options.out)


if __name__ == "__main__":
    run_cli(main)
