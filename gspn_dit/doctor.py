"""`python -m gspn_dit.doctor`: what is installed here, which scan backends work, and what would fix the others.

Nothing heavy is imported before it is asked about, so that a broken installation is reported and not a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gspn_dit import environment
from gspn_dit.environment import installed_version
from gspn_dit.errors import ArgumentParser, UserError, run_cli

PACKAGES = ("torch", "numpy", "diffusers", "accelerate", "datasets", "torch-fidelity", "safetensors")
CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
WINDOWS = (None, 4)  # of the self-check: one segment, and segments that do not divide
LARGEST_ERROR = 1e-4
"""Error allowed in the self-check, relative to the largest value: float32 kernels against the float64 reference."""


@dataclass(frozen=True)
class BackendReport:
    """What one scan backend does on this machine."""

    name: str
    works: bool
    detail: str
    """What runs and how close to the reference it is, or why it does not run."""
    fix: str | None = None
    """The command or step that would make it work."""


def find_versions() -> dict[str, str | None]:
    """Return the versions of Python and the libraries that matter; None for what is not installed."""
    cupy = [f"{package} {version}" for package in CUPY_PACKAGES if (version := installed_version(package))]
    return {**environment.versions(PACKAGES), "cupy": ", ".join(cupy) or None}


def describe_machine() -> dict[str, Any]:
    """Return what `environment.machine` does, and the GPUs."""
    gpus, note = _find_gpus()
    return {**environment.machine(), "gpus": gpus, "gpu_note": note}


def _find_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Return the GPUs that PyTorch sees, and what it says about those it cannot use."""
    try:
        import torch

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        if not available:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            return [], "; ".join([f"none that PyTorch ({built}) can use", *(str(w.message) for w in caught)])
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [
            {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            for gpu in properties
        ], None
    except Exception as error:
        return [], _in_one_line(error)


def check_backend(backend: str, device: str) -> str:
    """Compare a backend with the float64 reference on tiny inputs, forward and all gradients.

    Returns what was compared; raises RuntimeError where it differs, or whatever the backend raises.
    """
    import torch

    from gspn_dit.ops import gspn_scan

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 6, 4), (2, 5, 6, 4, 3, 2), (2, 5, 6, 4, 4), (2, 5, 6, 4, 4), (4,))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)

    def run(window: int | None, backend: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [value.to(device, dtype).requires_grad_() for value in values]
        x, logits, input_gate, output_gate, merge_weight = leaves
        y = gspn_scan(x, logits, input_gate, output_gate, merge_weight, window=window, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(device, dtype))]

    worst = 0.0
    for window in WINDOWS:
        expected = run(window, "reference", "cpu", torch.float64)
        for actual, truth in zip(run(window, backend, device, torch.float32), expected, strict=True):
            error = float((actual.double().cpu() - truth).abs().max() / truth.abs().max())
            if not error <= LARGEST_ERROR:
                raise RuntimeError(f"differs from the reference by {error:.1e} of the largest value")
            worst = max(worst, error)
    return f"forward and gradients within {worst:.0e} of the reference"


def inspect_backends() -> list[BackendReport]:
    """Try every backend on this machine."""
    try:
        from gspn_dit.ops.cpu import binding as cpu
        from gspn_dit.ops.cuda import binding as cuda
    except Exception as error:
        broken = f"gspn_dit.ops cannot be imported: {_in_one_line(error)}"
        fix = None if installed_version("torch") else f"pip install {_requirement()}"
        return [BackendReport(name, False, broken, fix) for name in ("reference", "cpu", "cupy")]
    reports = [
        _try_backend("reference", "cpu", "plain PyTorch, any device"),
        _try_backend("cpu", "cpu", cpu.describe()),
    ]
    try:
        problem = cuda.problem()
    except Exception as error:
        problem = _in_one_line(error)
    if problem is None:
        return [*reports, _try_backend("cupy", "cuda", cuda.describe())]
    return [*reports, BackendReport("cupy", False, problem, _fix_for_cupy())]


def find_toolchain() -> dict[str, Any]:
    """Return what compiles the CUDA kernels here, which needs no GPU, or why nothing does and the fix."""
    try:
        import torch

        from gspn_dit.ops.cuda import binding as cuda

        return asdict(cuda.toolchain())
    except Exception as error:
        cupy = [package for package in CUPY_PACKAGES if installed_version(package)]
        fix = None
        if installed_version("torch") and not cupy:
            built_for = (torch.version.cuda or "13").split(".")[0]
            fix = f"pip install {_requirement(f'cuda{built_for}')}"
        elif len(cupy) == 1 and cupy[0] != "cupy":
            fix = f"pip install '{cupy[0]}[ctk]'"
        return {"problem": _in_one_line(error), "fix": fix}


def _try_backend(name: str, device: str, what: str) -> BackendReport:
    try:
        return BackendReport(name, True, f"{what}; {check_backend(name, device)}")
    except Exception as error:
        return BackendReport(name, False, f"{what}; {_in_one_line(error)}")


def _fix_for_cupy() -> str | None:
    """Return the step that brings the CuPy backend closer to working, or None if nothing seems to be missing."""
    import torch

    if torch.version.cuda is None:
        return "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
    if not torch.cuda.is_available():
        return "run on a machine where `nvidia-smi` lists a GPU; there is nothing to install for this one"
    major = torch.version.cuda.split(".")[0]
    wanted = f"cupy-cuda{major}x"
    others = [package for package in CUPY_PACKAGES if package != wanted and installed_version(package)]
    if installed_version(wanted) and not others:
        return None
    install = f"pip install {_requirement(f'cuda{major}')}"
    return f"pip uninstall -y {' '.join(others)} && {install}" if others else install


def _requirement(extra: str = "") -> str:
    """Return how pip names this project: the checkout where it runs from one, the distribution elsewhere."""
    suffix = f"[{extra}]" if extra else ""
    if (Path(__file__).parents[1] / "pyproject.toml").is_file():
        return f"-e '.{suffix}'"
    return f"'gspn-dit{suffix}'"


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def diagnose() -> dict[str, Any]:
    """Return everything the doctor knows, as JSON types; `ok` says whether the CPU path works."""
    reports = inspect_backends()
    return {
        "ok": all(report.works for report in reports if report.name in ("reference", "cpu")),
        "versions": find_versions(),
        "machine": describe_machine(),
        "override": os.environ.get("GSPN_SCAN_BACKEND"),
        "backends": [asdict(report) for report in reports],
        "cuda_compiler": find_toolchain(),
    }


def format_report(diagnosis: dict[str, Any]) -> str:
    """Lay a diagnosis out for a reader."""
    lines = ["Versions"]
    lines += [f"  {name:<15}{version or 'not installed'}" for name, version in diagnosis["versions"].items()]
    machine = diagnosis["machine"]
    lines += ["Machine", *(f"  {line}" for line in environment.machine_lines(machine))]
    for gpu in machine["gpus"]:
        size, capability = environment.gibibytes(gpu["memory_bytes"]), gpu["compute_capability"]
        lines.append(f"  {'GPU':<15}{gpu['name']}, compute capability {capability}, {size}")
    if machine["gpu_note"]:
        lines.append(f"  {'GPU':<15}{machine['gpu_note']}")
    lines += ["CUDA compiler", *_format_toolchain(diagnosis["cuda_compiler"])]
    lines.append("Scan backends")
    for report in diagnosis["backends"]:
        lines.append(f"  {report['name']:<15}{'works' if report['works'] else 'does not work'}: {report['detail']}")
        if report["fix"]:
            lines.append(f"  {'':<15}to fix it: {report['fix']}")
    if diagnosis["override"]:
        lines.append(f"  GSPN_SCAN_BACKEND={diagnosis['override']} stands in for backend='auto' in this environment.")
    works = "works" if diagnosis["ok"] else "does not work"
    return "\n".join([*lines, f"The CPU path {works}."])


def _format_toolchain(tools: dict[str, Any]) -> list[str]:
    if "problem" in tools:
        fix = [f"  {'':<15}to fix it: {tools['fix']}"] if tools["fix"] else []
        return [f"  {'NVRTC':<15}not found: {tools['problem']}", *fix]
    architectures = ", ".join(tools["architectures"]) or "no GPU here; python -m gspn_dit.ops.inspect compiles for any"
    return [
        f"  {'NVRTC':<15}{tools['nvrtc']}, through CuPy {tools['cupy']}",
        f"  {'architecture':<15}{architectures}",
        f"  {'cache':<15}{tools['cache_directory']}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the diagnosis; exit code 0 if the CPU path works, else 1. --golden compares samples instead."""
    parser = ArgumentParser(
        description="Say what is installed, which scan backends work here, and what would fix the others.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--golden", action="store_true", help="draw samples of builtin:digits, and compare them with "
                        "those that the package was made with")  # fmt: skip
    parser.add_argument(
        "--device", help="of --golden: cpu, cuda, … (default: the accelerator if there is one, else cpu)"
    )
    options = parser.parse_args(arguments)
    if options.golden:
        sys.exit(0 if _check_golden(options.device, options.json) else 1)
    if options.device:
        raise UserError("--device is for --golden; leave it out")
    as_json = options.json
    diagnosis = diagnose()
    print(json.dumps(diagnosis, indent=2) if as_json else format_report(diagnosis))
    sys.exit(0 if diagnosis["ok"] else 1)


def _check_golden(device: str | None, as_json: bool) -> bool:
    """Print how far golden samples are from the stored ones, and tell whether they are near enough."""
    from gspn_dit.golden import compare
    from gspn_dit.sampling_options import choose_device

    found = compare(choose_device(device))
    print(json.dumps({**asdict(found), "passed": found.passed}) if as_json else found)
    if not found.passed and not as_json:
        print("this machine computes something else: look at the scan backends by python -m gspn_dit.doctor")
    return found.passed


def cli() -> None:
    """The command `gspn-doctor`."""
    run_cli(main)


if __name__ == "__main__":
    cli()
