"""Compile the CUDA kernels into CuPy's cache on a machine without a GPU, so that a GPU's minutes go to measuring.

What `gspn_dit.ops.inspect` predicts of the shapes that are timed is written beside them, `estimates.json`.

    CUPY_CACHE_DIR=runs/gpu/cubins python -m benchmarks.gpu_cache --arch sm_90

CuPy finds a compiled module by what it was compiled from, its options and the architecture, and asks a GPU for nothing
but the last: with that given, its own functions write the files that it finds there. Both machines need the same
versions of CuPy and NVRTC.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.ops.cuda.devices import ARCHITECTURES
from gspn_dit.ops.cuda.plan import plan
from gspn_dit.ops.cuda.projected_backward_plan import plan_backward
from gspn_dit.ops.cuda.projected_plan import ProjectedGeometry, ProjectedPlan, plan_forward
from gspn_dit.ops.cuda.sources import compile_options, source_text
from gspn_dit.ops.cuda.types import Geometry, Variant
from gspn_dit.ops.inspect import inspect

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _Unloaded:
    """Stands in for a module on a GPU."""

    def load(self, cubin: bytes) -> None: ...

    def _set_mapping(self, mapping: object) -> None: ...


def compile_into_cache(variant: Variant, arch: str) -> None:
    """Compile a variant for an architecture such as "sm_90" into CUPY_CACHE_DIR, unless it is there.

    Raises:
        UserError: this CuPy's compiler is not the one that is known here.
    """
    from cupy.cuda import compiler

    number = arch.removeprefix("sm_")
    known: dict[str, Any] = {
        "function": types.SimpleNamespace(Module=_Unloaded),
        "_get_arch_for_options_for_nvrtc": lambda arch=None: (f"-arch=sm_{number}", "cubin"),
    }
    if missing := [name for name in (*known, "_compile_module_with_cache") if not hasattr(compiler, name)]:
        raise UserError(
            f"this CuPy compiles in another way (it has no {', '.join(missing)}): let the GPU's machine compile"
        )
    kept = {name: getattr(compiler, name) for name in known}
    try:
        for name, value in known.items():
            setattr(compiler, name, value)
        compiler._compile_module_with_cache(source_text(variant.source), compile_options(variant), arch=number)
    finally:
        for name, value in kept.items():
            setattr(compiler, name, value)


def variants(arch: str, shapes: Iterable[tuple[int, int, int, int]]) -> list[Variant]:
    """The variants that scans of these shapes [B, H, W, C] run, forward and backward, and the fused ones."""
    device, found = ARCHITECTURES[arch], dict[Variant, None]()
    for dtype in DTYPES:
        for batch, height, width, channels in shapes:
            alignment = next(power for power in (8, 4, 2, 1) if channels % power == 0)
            geometry = Geometry(dtype, batch, height, width, channels, channels, (0, 1, 2, 3), 0, alignment)
            for backward in (False, True):
                found |= dict.fromkeys(launch.variant for launch in plan(geometry, device, backward).launches)
            proxy = max(channels // 16, 8)
            projected = ProjectedGeometry(dtype, batch, height, width, channels, channels, proxy, (0, 1, 2, 3), 0)
            for fused in (plan_forward(projected, device), plan_backward(projected, device)):
                if isinstance(fused, ProjectedPlan):
                    found |= dict.fromkeys(launch.variant for launch in fused.launches)
    return list(found)


def estimate(arch: str, shape: Sequence[int]) -> dict[str, float]:
    """Milliseconds of each kernel of a bfloat16 scan [B, H, W, C]; empty where they cannot be predicted here."""
    reports = inspect(arch, (*shape, shape[3]), [torch.bfloat16])
    return {report.kernel: report.predicted_ms for report in reports if report.predicted_ms is not None}


def main() -> None:
    """Compile what benchmarks.gpu runs."""
    from benchmarks.gpu_steps import ESTIMATES, GPU_SHAPES, TIMED_SHAPES

    parser = ArgumentParser(prog="benchmarks.gpu_cache", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=tuple(ARCHITECTURES), help="of the GPU")
    options = parser.parse_args()
    if not (folder := os.environ.get("CUPY_CACHE_DIR")):
        raise UserError("CUPY_CACHE_DIR is not set: give the directory that is to go to the GPU's machine")
    wanted = variants(options.arch, GPU_SHAPES)
    for number, variant in enumerate(wanted, 1):
        compile_into_cache(variant, options.arch)
        print(f"{number} of {len(wanted)}: {variant.regime}, {str(variant.dtype).removeprefix('torch.')}", flush=True)
    found = {"x".join(map(str, shape)): estimate(options.arch, shape) for shape in TIMED_SHAPES}
    (Path(folder) / ESTIMATES).write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(f"{folder} holds {len(list(Path(folder).glob('*.cubin')))} compiled modules for {options.arch}")


if __name__ == "__main__":
    run_cli(main)
