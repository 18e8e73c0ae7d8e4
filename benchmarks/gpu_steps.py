"""The steps of benchmarks/gpu.py: each takes the machine that runs the kernels, and returns its part of the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import scan_cases
from benchmarks.measure import CpuDevice
from gspn_dit.errors import UserError
from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.materialised import projected_backward, projected_forward
from gspn_dit.ops.reference import scan_reference

REGIMES = {
    **{"short": (2, 16, 16, 64), "cluster": (1, 128, 96, 40)},
    **{"wide": (1, 250, 200, 20), "long": (1, 4200, 64, 20)},
}
"""A shape [B, H, W, C] that each kind of kernel runs on an H100."""
TIMED_SHAPES = (
    *((32, 16, 16, 1152), (256, 16, 16, 1152), (1, 128, 128, 240), (1, 128, 128, 256)),
    *((1, 1024, 1024, 64), (16, 1024, 1024, 8)),
)
GPU_SHAPES = (*REGIMES.values(), *TIMED_SHAPES)
MODELS = ("GSPN-XL/2", "DiT-XL/2")
GPU_TESTS = "published or shared or extreme or graph or stream or repeat"
HEAD_CHANNELS = 64
ATTENTION_TOKENS = 16_384
"""Attention is timed up to so many tokens."""
ESTIMATES = "estimates.json"


@dataclass(frozen=True)
class Machine:
    """What runs the kernels."""

    device: str
    backend: str
    """Of `gspn_scan`."""
    projected: Callable[..., Tensor]
    projected_backward: Callable[..., Sequence[Tensor]]
    clock: CpuDevice
    is_gpu: bool

    def use(self, regime: str | None) -> None:
        """On a CPU, run the compiled kernels of a regime where PyTorch calls the CPU's; a GPU plans for itself."""


def gpu() -> Machine:
    """The current GPU."""
    from benchmarks.scan_cuda import CudaDevice
    from gspn_dit.ops.cuda.binding import problem, projected_backward, projected_forward

    if (reason := problem()) is not None:
        raise UserError(f"nothing can be measured on a GPU: {reason}")
    return Machine("cuda", "cupy", projected_forward, projected_backward, CudaDevice(), True)


class Rehearsal(Machine):
    """The CPU in a GPU's place: NVRTC's PTX, translated and run. It shows that the steps work, not what they take."""

    def use(self, regime: str | None) -> None:
        from gspn_dit.ops.cpu import binding
        from gspn_dit.ops.cuda.host.ptx.host import PtxHost

        # Threads beside a tile read what nobody wrote; it is NaN here and may reach no result.
        forward, backward = PtxHost(unwritten_fails=False).scans(regime)
        binding.scan_forward, binding.scan_backward = forward, backward  # type: ignore[assignment]


def rehearsal() -> Machine:
    """This CPU; needs g++, and CuPy for NVRTC."""
    from gspn_dit.ops.cuda.host.harness import H100
    from gspn_dit.ops.cuda.host.ptx.host import PtxHost
    from gspn_dit.ops.cuda.projected import run_projected_backward, run_projected_forward

    host = {"device": H100, "launcher": PtxHost()}
    forward, backward = partial(run_projected_forward, **host), partial(run_projected_backward, **host)  # type: ignore[arg-type]
    return Rehearsal("cpu", "cpu", forward, backward, CpuDevice(), False)  # type: ignore[arg-type]


def machine(of: Machine) -> dict[str, Any]:
    """What it is, and which tools are here."""
    tools = {name: shutil.which(name) for name in ("ncu", "compute-sanitizer", "nvidia-smi")}
    facts: dict[str, Any] = {**of.clock.describe(), "torch": torch.__version__, "tools": tools}
    if tools["nvidia-smi"]:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
        facts["nvidia_smi"] = subprocess.run(query, capture_output=True, encoding="utf-8", check=False).stdout
    return facts


def correctness(of: Machine, regime: str) -> dict[str, Any]:
    """The largest error of y and of each gradient against the float64 reference, in bfloat16 and float32."""
    of.use(regime)
    shape = REGIMES[regime] if of.is_gpu else (1, 5, 6, 8)
    found: dict[str, Any] = {"shape": list(shape)}
    for dtype in (torch.bfloat16, torch.float32) if of.is_gpu else (torch.bfloat16,):
        errors = scan_cases.errors(shape, shape[3], None, dtype, of.device, of.backend)
        tolerance = scan_cases.TOLERANCES[dtype]
        found[str(dtype).removeprefix("torch.")] = {
            "largest_error": {name: float(f"{error:.3g}") for name, error in errors.items()},
            "tolerance": tolerance,
            "right": all(error <= tolerance for error in errors.values()),
        }
    found["repeats_bit_by_bit"] = _repeats(of, shape)
    return found


def _repeats(of: Machine, shape: tuple[int, ...]) -> bool:
    inputs = scan_cases.make_inputs(shape, 4, shape[3], torch.bfloat16, of.device)
    grad_y = torch.ones_like(inputs[0])
    first, second = (scan_cases.forward_backward(inputs, DIRECTIONS, of.backend, grad_y) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def projected(of: Machine) -> dict[str, Any]:
    """The fused passes against the float64 reference of one image, with their times beside those through memory."""
    sizes = (32, 16, 16, 1152, 72) if of.is_gpu else (1, 5, 6, 8, 4)
    batch, height, width, channels, proxy_channels = sizes
    generator = torch.Generator(of.device).manual_seed(0)
    shapes = (
        *((batch, height, width, channels), (batch, height, width, proxy_channels)),
        *((12 * channels, proxy_channels), (4 * channels, proxy_channels), (4 * channels, proxy_channels)),
    )
    x, proxy, *weights = (
        torch.randn(size, generator=generator, device=of.device).mul_(0.2 if i > 1 else 1).bfloat16()
        for i, size in enumerate(shapes)
    )
    arguments = (x, proxy, weights, torch.ones(4, device=of.device), None, [0, 1, 2, 3], 0)
    # Only the first image has a gradient, so that it alone makes those of the weights.
    grad_y = torch.zeros_like(x)
    grad_y[0] = torch.cos(torch.arange(x[0].numel(), device=of.device)).reshape(x[0].shape)
    y, gradients = of.projected(*arguments), of.projected_backward(grad_y, *arguments)
    leaves = [tensor.double().requires_grad_() for tensor in (x[:1], proxy[:1], *weights)]
    exact = projected_forward(scan_reference, leaves[0], leaves[1], leaves[2:], *arguments[3:])
    pairs = {"y": (y[:1], exact.detach())}
    found_by_name = (gradients[0][:1], gradients[1][:1], *gradients[2:5])
    names = ("x", "proxy", "logits_weight", "input_gate_weight", "output_gate_weight")
    wanted = torch.autograd.grad(exact, leaves, grad_y[:1].double())
    pairs |= {f"grad_{name}": pair for name, pair in zip(names, zip(found_by_name, wanted, strict=True), strict=True)}
    errors = {
        name: ((one.double() - other).abs() / (other.abs() + other.abs().max() / 100)).max().item()
        for name, (one, other) in pairs.items()
    }
    found: dict[str, Any] = {
        "sizes": list(sizes),
        "largest_error": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "right": all(error <= 3e-2 for error in errors.values()),
        "repeats_bit_by_bit": all(map(torch.equal, gradients, of.projected_backward(grad_y, *arguments))),
    }
    if of.is_gpu:
        from gspn_dit.ops.cuda.binding import scan_backward, scan_forward

        runs: dict[str, Callable[[], object]] = {
            "fused": partial(of.projected, *arguments),
            "memory": partial(projected_forward, scan_forward, *arguments),
            "fused_backward": partial(of.projected_backward, grad_y, *arguments),
            "memory_backward": partial(projected_backward, scan_backward, grad_y, *arguments),
        }
        found |= {name: timing.as_json() for name, timing in of.clock.time_together(runs, 20).items()}
    return found


def tests(of: Machine) -> dict[str, Any]:
    """The outcomes of the tests that need a GPU; without one they are only collected."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["tests/ops/cuda/test_gpu.py", "-k", GPU_TESTS, *([] if of.is_gpu else ["--collect-only"])]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    counts = {
        name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|error|skipped|tests)", done.stdout)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"exit_code": done.returncode, **counts, "failed_tests": failed, "right": done.returncode == 0}


def times(of: Machine, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """A scan from a CUDA graph beside a copy in the same run, attention at equal tokens and width, the estimate."""
    if not of.is_gpu:
        of.use("long")
        shape = (1, 6, 5, 8)
        inputs = scan_cases.make_inputs(shape, 4, shape[3], torch.bfloat16, "cpu")
        timing = of.clock.time_together({"forward": lambda: gspn_scan(*inputs, backend="cpu")}, 1)["forward"]
        return {"shape": list(shape), "forward": timing.as_json(), "attention": _attention(of, shape), "estimate": {}}
    from benchmarks.scan_cuda import graph_times

    benchmark = scan_cases.Benchmark(of.clock, repeats=20, quick=False)
    found = graph_times(benchmark, shape, torch.bfloat16)
    return {**found, "attention": _attention(of, shape), "estimate": estimate(shape)}


def _attention(of: Machine, shape: tuple[int, int, int, int]) -> dict[str, Any] | None:
    batch, height, width, channels = shape
    if height * width > ATTENTION_TOKENS or (channels % HEAD_CHANNELS and channels > HEAD_CHANNELS):
        return None
    heads = max(channels // HEAD_CHANNELS, 1)
    sizes = (batch, heads, height * width, channels // heads)
    query, key, value = (torch.randn(sizes, device=of.device, dtype=torch.bfloat16) for _ in range(3))
    runs = {"attention": lambda: F.scaled_dot_product_attention(query, key, value)}
    return of.clock.time_together(runs, 20 if of.is_gpu else 1)["attention"].as_json()


def estimate(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """What was predicted beforehand of each kernel, in milliseconds; empty where benchmarks.gpu_cache did not run."""
    file = Path(os.environ.get("CUPY_CACHE_DIR", ".")) / ESTIMATES
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return known.get("x".join(map(str, shape)), {})


def models(of: Machine, name: str) -> dict[str, Any]:
    """Images per second and peak memory of a model: 20 training steps and forward passes in bfloat16."""
    from benchmarks.models import measure

    of.use(None)
    settings = {"device": "cuda", "batch": 32, "latent_size": 32, "steps": 20, "dtype": "bfloat16", "compile": False}
    if not of.is_gpu:
        name = name.replace("XL", "T")
        settings |= {"device": "cpu", "batch": 1, "latent_size": 8, "steps": 1, "dtype": "float32"}
    return measure(name, SimpleNamespace(**settings))  # type: ignore[arg-type]


def tool(of: Machine, name: str) -> dict[str, Any]:
    """What compute-sanitizer or ncu say of one small scan, where they are installed."""
    path = shutil.which(name)
    if path is None or not of.is_gpu:
        return {"skipped": f"{name} is not installed" if of.is_gpu else "there is no GPU"}
    options = {
        "compute-sanitizer": ["--tool", "memcheck", "--error-exitcode", "1"],
        "ncu": ["--set", "basic", "--section", "WarpStateStats", "--kernel-name", "regex:gspn", "--launch-count", "4"],
    }[name]
    script = (
        "import torch; from benchmarks import scan_cases as s; from gspn_dit.ops import DIRECTIONS as d; "
        "i = s.make_inputs((2, 16, 16, 64), 4, 64, torch.bfloat16, 'cuda'); "
        "s.forward_backward(i, d, 'cupy', i[0]); torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [path, *options, sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False
    )
    return {"exit_code": done.returncode, "right": done.returncode == 0, "output": done.stdout[-6000:]}
