"""Text and compiler options of the CUDA kernels, for CuPy's NVRTC with or without a GPU."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from gspn_dit.ops.cuda.types import Variant

CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy adds to a module's own options and the architecture."""

_INCLUDE = re.compile(r'#include "(\w+\.cuh)"\n')


def source_folder() -> Path:
    """Where the kernels' sources lie: inside the installed package, else at the top of the checkout."""
    here = Path(__file__).resolve()
    folders = (here.parents[1] / "cuda_src", here.parents[3] / "cuda")
    for folder in folders:
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(f"the CUDA sources of gspn_dit are missing: neither {folders[0]} nor {folders[1]} has them")


@cache
def source_text(name: str) -> str:
    """One source file with its headers put in: CuPy keys its cache of compiled modules by this text."""
    text = (source_folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda include: source_text(include[1]), text)


def compile_options(variant: Variant) -> tuple[str, ...]:
    """NVRTC options of a variant, without the architecture and what CuPy adds."""
    # At its default level the assembler keeps so many loads in flight that a few registers spill.
    options = ("--std=c++17", "--ptxas-options=--register-usage-level=0")
    return (*options, *(f"-D{name}={value}" for name, value in variant.defines.items()))


def compile_cubin(variant: Variant, arch: str) -> tuple[bytes, str]:
    """Compile a variant as CuPy does, for an architecture such as "sm_90", on any machine.

    Returns the cubin and ptxas's log.

    Raises RuntimeError with the compiler's log where it fails, ImportError without CuPy.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source_text(variant.source), variant.source, (), ())
    options = (*compile_options(variant), *CUPY_OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{variant} for {arch}: {error}\n{nvrtc.getProgramLog(program)}") from None
    try:
        # CuPy leaves off the last byte, which is a NUL.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
