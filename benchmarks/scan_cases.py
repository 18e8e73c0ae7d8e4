"""What benchmarks/scan.py times: shapes, the fewest bytes of each, the gate that kernels must pass, and the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import mixer_cases
from benchmarks.measure import CpuDevice, Timing, software
from gspn_dit.ops import DIRECTIONS, gspn_scan

DEVICES = {"cpu": CpuDevice}
SHAPES = ((8, 16, 16, 1152), (1, 64, 64, 1152), (1, 256, 256, 128))
QUICK_SHAPES = ((2, 16, 16, 256), (1, 64, 64, 64))
DIRECTION_SETS = (DIRECTIONS, ("right", "left"), ("down", "up"))
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
COPY_ELEMENTS = 64 << 20
SECONDS_PER_ROW = 10.0
"""A row of the table ends its last round after this time."""
SCALING_TOKENS, SCALING_CHANNELS = 512 * 512, 64
ATTENTION_QUERIES = 2048
"""At more tokens than this, attention is timed for as many queries and multiplied."""
ATTENTION_TOKENS = 4096
"""At more tokens than this, no whole mixer with attention is timed."""
MIXERS = ("gspn", mixer_cases.THROUGH_MEMORY, "attention", "linear", "conv")
"""Of `mixer_cases.VARIANTS`."""


def scan_bytes(shape: Sequence[int], directions: int, groups: int, dtype: torch.dtype, backward: bool) -> int:
    """Return the fewest bytes that a forward or backward must read and write."""
    batch, height, width, channels = shape
    per_direction = directions * (3 * groups / channels + 2)
    elements = (3 + 2 * per_direction) if backward else (2 + per_direction)
    return int(batch * height * width * channels * elements * dtype.itemsize)


def make_inputs(shape: Sequence[int], directions: int, groups: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return x, weight_logits, input_gate, output_gate and merge_weight, normally distributed."""
    batch, height, width, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    shapes = (
        (batch, height, width, channels),
        (batch, height, width, directions, 3, groups),
        (batch, height, width, directions, channels),
        (batch, height, width, directions, channels),
    )
    tensors = [torch.empty(s, dtype=dtype, device=device).normal_(generator=generator) for s in shapes]
    merge_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [*tensors, torch.empty(directions, dtype=merge_dtype, device=device).uniform_(generator=generator)]


def returned_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of y and four gradients: float32, four directions, per-channel weights."""
    batch, height, width, channels = shape
    return (2 + 5 * len(DIRECTIONS)) * batch * height * width * channels * torch.float32.itemsize


def forward_backward(inputs: list[Tensor], directions: Sequence[str], backend: str, grad_y: Tensor) -> list[Tensor]:
    """Return y and the five gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = gspn_scan(*leaves, directions=directions, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, grad_y)]


def errors(
    shape: Sequence[int], groups: int, window: int | None, dtype: torch.dtype, device: str, backend: str
) -> dict[str, float]:
    """Return the largest error of y and of each gradient against the float64 reference, relative above 1."""
    inputs = make_inputs(shape, 4, groups, dtype, device)
    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    exact = [tensor.double() for tensor in inputs]
    results = []
    for tensors, name, gradient in ((inputs, backend, grad_y), (exact, "reference", grad_y.double())):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = gspn_scan(*leaves, window=window, backend=name)
        results.append([y, *torch.autograd.grad(y, leaves, gradient)])
    return {
        name: ((value.double() - expected).abs() / (1 + expected.abs())).max().item()
        for name, value, expected in zip(("y", "x", "logits", "input_gate", "output_gate", "merge"), *results)
    }


def correctness_error(device: str, backend: str) -> str | None:
    """Compare with the float64 reference; return a sentence about the first disagreement, or None."""
    for shape, groups, window in (((2, 5, 7, 40), 40, None), ((1, 9, 6, 48), 3, 4), ((1, 33, 17, 132), 132, None)):
        for dtype, tolerance in TOLERANCES.items():
            for name, error in errors(shape, groups, window, dtype, device, backend).items():
                if not error <= tolerance:
                    return f"{name} at {shape}, {groups} groups, {dtype}: error {error:.1e} above {tolerance:.0e}"
    return None


def memory_report(ours: int | None, theirs: int | None, returned: int) -> dict[str, Any]:
    """Compare two peaks, without and with the tensors that both must return."""
    known = ours is not None and theirs is not None and theirs > returned
    return {
        "returned_bytes": returned,
        "memory_ratio": round(max(0, ours - returned) / (theirs - returned), 3) if known else None,  # type: ignore
        "memory_ratio_with_results": round(ours / theirs, 3) if ours is not None and theirs else None,
    }


def peak_on_cpu(backend: str, shape: Sequence[int]) -> int | None:
    """Return the peak extra bytes of forward + backward in this process, float32, four directions."""
    tiny = make_inputs((1, 2, 2, 16), 4, 16, torch.float32, "cpu")
    forward_backward(tiny, DIRECTIONS, backend, tiny[0])  # loads what the first call loads
    inputs = make_inputs(shape, 4, shape[3], torch.float32, "cpu")
    grad_y = torch.randn_like(inputs[0])
    return CpuDevice().peak_extra_bytes(lambda: forward_backward(inputs, DIRECTIONS, backend, grad_y))


def peak_in_own_process(backend: str, shape: Sequence[int]) -> int | None:
    """Return `peak_on_cpu` of a fresh process, whose memory no earlier run has shaped."""
    command = [sys.executable, "-m", "benchmarks.scan_cases", backend, *map(str, shape)]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=True)
    value: int | None = json.loads(result.stdout)
    return value


class Benchmark:
    """The measurements of one device."""

    def __init__(self, device: CpuDevice, repeats: int, quick: bool) -> None:
        self.device, self.repeats, self.quick = device, repeats, quick
        self.backend = "cupy" if device.name == "cuda" else "cpu"
        source = torch.randn(COPY_ELEMENTS // (8 if quick else 1), device=device.name)
        target = torch.empty_like(source)
        self.copy: Callable[[], object] = lambda: target.copy_(source)
        self.copy_bytes = 2 * source.numel() * source.itemsize

    def _share(self, timing: Timing, copy: Timing, moved: int) -> dict[str, Any]:
        share = moved / timing.best / (self.copy_bytes / copy.best)
        of_medians = moved / timing.median / (self.copy_bytes / copy.median)
        per_cpu_second = moved / min(timing.cpu_seconds) / (self.copy_bytes / min(copy.cpu_seconds))
        return {
            **timing.as_json(),
            "share_of_copy": round(share, 3),
            "share_of_copy_medians": round(of_medians, 3),
            "share_of_copy_per_cpu_second": round(per_cpu_second, 3),
        }

    def shape(self, shape: Sequence[int], directions: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        """Time forward and backward of one shape in turn with `copy_`."""
        channels, count = shape[3], len(directions)
        inputs = make_inputs(shape, count, channels, dtype, self.device.name)
        grad_y = torch.randn_like(inputs[0])
        leaves = [tensor.requires_grad_() for tensor in inputs]
        y = gspn_scan(*leaves, directions=directions, backend=self.backend)

        @torch.no_grad()
        def forward() -> Tensor:
            return gspn_scan(*inputs, directions=directions, backend=self.backend)

        def backward() -> object:
            return torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

        times = self.device.time_together({"copy": self.copy, "forward": forward, "backward": backward}, self.repeats)
        moved = [scan_bytes(shape, count, channels, dtype, backward) for backward in (False, True)]
        return {
            "shape": list(shape),
            "directions": list(directions),
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": len(times["copy"].seconds),
            "copy_gb_per_second": round(self.copy_bytes / times["copy"].best / 1e9, 2),
            "forward": self._share(times["forward"], times["copy"], moved[0]),
            "backward": self._share(times["backward"], times["copy"], moved[1]),
        }

    def reads(self, shape: Sequence[int]) -> dict[str, Any]:
        """Time reading alone of what one of four directions reads: per token one run of logits and one of a gate.

        Rows go into a buffer that stays in a cache, by `copy_`, from where they lie and from runs of the same length
        that lie 64 bytes apart, which cost `copy_` the same. What is lost here no arithmetic can win back. On one
        thread: a row is too short a task to wake another for.
        """
        batch, height, width, channels = shape
        rows, report = batch * height, {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for name, run in (("logits", 3 * channels), ("gate", channels)):
            values = torch.ones(rows, width, len(DIRECTIONS), run, device=self.device.name)
            ordered = torch.ones(rows, width, run + 16, device=self.device.name)[..., :run]
            buffer = torch.empty(width, run, device=self.device.name)

            def read(source: Tensor, buffer: Tensor = buffer) -> None:
                for row in source.unbind():
                    buffer.copy_(row)

            runs: dict[str, Callable[[], object]] = {
                "in_order": lambda: read(ordered),  # noqa: B023
                "in_runs": lambda: read(values[:, :, 0]),  # noqa: B023
            }
            times = self.device.time_together(runs, self.repeats)
            rates = {how: rows * buffer.nbytes / timing.best / 1e9 for how, timing in times.items()}
            report[name] = {
                "run_bytes": run * values.itemsize,
                **{f"{how}_gb_per_second": round(rate, 2) for how, rate in rates.items()},
                "in_runs_over_in_order": round(rates["in_runs"] / rates["in_order"], 3),
            }
        torch.set_num_threads(threads)
        return {"shape": list(shape), **report}

    def reference(self, shape: Sequence[int]) -> dict[str, Any]:
        """Compare forward + backward, float32, four directions, with the reference: time and peak extra memory."""
        inputs = make_inputs(shape, 4, shape[3], torch.float32, self.device.name)
        grad_y = torch.randn_like(inputs[0])
        runs: dict[str, Callable[[], object]] = {
            name: lambda name=name: forward_backward(inputs, DIRECTIONS, name, grad_y)  # type: ignore[misc]
            for name in (self.backend, "reference")
        }
        times = self.device.time_together(runs, 1 if self.quick else 2)
        if self.device.needs_own_process:
            peaks = {name: peak_in_own_process(name, shape) for name in runs}
        else:
            peaks = {name: self.device.peak_extra_bytes(run) for name, run in runs.items()}
        return {
            "shape": list(shape),
            "ms": {name: timing.as_json() for name, timing in times.items()},
            "times_faster": round(times["reference"].best / times[self.backend].best, 2),
            **memory_report(peaks[self.backend], peaks["reference"], returned_bytes(shape)),
            "peak_extra_bytes": peaks,
        }

    def attention(self, shape: Sequence[int]) -> dict[str, Any]:
        """Compare forward + backward with scaled_dot_product_attention at the same tokens and width, 64 per head."""
        batch, height, width, channels = shape
        tokens, heads = height * width, max(1, channels // 64)
        dtype = torch.bfloat16 if self.device.name == "cuda" else torch.float32  # what its fastest kernels take
        queries = min(tokens, ATTENTION_QUERIES)
        q, k, v = (
            torch.randn(batch, heads, n, channels // heads, device=self.device.name, dtype=dtype, requires_grad=True)
            for n in (queries, tokens, tokens)
        )

        def attend() -> object:
            result = F.scaled_dot_product_attention(q, k, v)
            return torch.autograd.grad(result, (q, k, v), result.detach())

        inputs = make_inputs(shape, 4, channels, dtype, self.device.name)

        def scan() -> object:
            return forward_backward(inputs, DIRECTIONS, self.backend, inputs[0])

        times = self.device.time_together({"attention": attend, "scan": scan}, 1 if self.quick else 2)
        factor = tokens / queries
        return {
            "shape": list(shape),
            "attention_ms": round(1e3 * factor * times["attention"].best, 3),
            "attention_is_extrapolated_from_queries": queries if factor > 1 else None,
            "scan_ms": round(1e3 * times["scan"].best, 3),
            "times_faster": round(factor * times["attention"].best / times["scan"].best, 2),
        }

    def mixers(self, shape: Sequence[int]) -> dict[str, Any]:
        """Compare whole mixers, forward + backward: the fused scan, the same through memory, attention, its peers."""
        *_, channels = shape
        dtype = torch.bfloat16 if self.device.name == "cuda" else torch.float32
        tokens = torch.randn(shape, device=self.device.name, dtype=dtype, requires_grad=True)
        left_out = [] if shape[1] * shape[2] <= ATTENTION_TOKENS else ["attention"]
        if self.device.name == "cuda":
            left_out.append(mixer_cases.THROUGH_MEMORY)  # is what the scan is there
        runs: dict[str, Callable[[], object]] = {
            variant: mixer_cases.runner(variant, mixer_cases.create_mixer(variant, channels).to(tokens), (tokens,))
            for variant in MIXERS
            if variant not in left_out
        }
        times = self.device.time_together(runs, self.repeats)
        return {
            "shape": list(shape),
            "ms": {variant: timing.as_json() for variant, timing in times.items()},
            "left_out": left_out,
            "times_as_fast_as_gspn": {
                variant: round(times["gspn"].best / timing.best, 3) for variant, timing in times.items()
            },
        }

    def scaling(self) -> dict[str, Any]:
        """Time per token at a constant number of tokens, from 16×16 to 512×512 (128×128 with --quick)."""
        tokens = SCALING_TOKENS // (16 if self.quick else 1)
        rows = []
        side = 16
        while side * side <= tokens:
            shape = (tokens // side**2, side, side, SCALING_CHANNELS)
            result = self.shape(shape, DIRECTIONS, torch.float32)
            nanoseconds = {
                f"{name}_{unit}_per_token": round(1e6 * result[name][key] / tokens, 2)
                for name in ("forward", "backward")
                for unit, key in (("ns", "best_ms"), ("cpu_ns", "cpu_ms"))
            }
            rows.append({"side": side, **nanoseconds})
            side *= 2
        summary = {
            f"{name}_slowest_over_fastest": round(max(row[name] for row in rows) / min(row[name] for row in rows), 3)
            for name in rows[0]
            if name != "side"
        }
        return {"tokens": tokens, "channels": SCALING_CHANNELS, "rows": rows, **summary}


def say(text: str) -> None:
    """Progress goes to standard error, so that standard output can be JSON."""
    print(text, file=sys.stderr, flush=True)


def run(
    device_name: str, quick: bool, repeats: int, shapes: Sequence[tuple[int, int, int, int]] | None = None
) -> dict[str, Any]:
    """Run everything and return the report; raises SystemExit if the kernels are wrong."""
    device = DEVICES[device_name](SECONDS_PER_ROW)
    benchmark = Benchmark(device, repeats, quick)
    problem = correctness_error(device.name, benchmark.backend)
    if problem:
        raise SystemExit(f"no figures, the kernels are wrong: {problem}")
    report: dict[str, Any] = {"device": device.describe(), "software": software(), "quick": quick, "repeats": repeats}
    shapes = shapes or (QUICK_SHAPES if quick else SHAPES)
    report["shapes"] = []
    for shape in shapes:
        for directions in DIRECTION_SETS:
            for dtype in DTYPES if len(directions) == 4 else DTYPES[:1]:
                row = benchmark.shape(shape, directions, dtype)
                report["shapes"].append(row)
                shares = " ".join(f"{name} {row[name]['share_of_copy']:.2f}" for name in ("forward", "backward"))
                say(f"{row['shape']} {'+'.join(directions)} {row['dtype']}: share of copy: {shares}")
    report["reads"] = [benchmark.reads(shape) for shape in shapes]
    say(f"reading alone: {report['reads']}")
    for name, measure in (("reference", benchmark.reference), ("attention", benchmark.attention)):
        report[name] = []
        for shape in shapes:
            report[name].append(measure(shape))
            row = report[name][-1]
            say(f"{list(shape)} {row['times_faster']:.1f} times faster than {name}, memory {row.get('memory_ratio')}")
    report["mixers"] = [benchmark.mixers(shape) for shape in shapes]
    say(f"mixers, times as fast as the fused scan: {[row['times_as_fast_as_gspn'] for row in report['mixers']]}")
    report["scaling"] = benchmark.scaling()
    say(f"scaling: {report['scaling']}")
    report["device_after"] = device.describe()
    return report


if __name__ == "__main__":
    print(json.dumps(peak_on_cpu(sys.argv[1], [int(size) for size in sys.argv[2:]])))
