"""Text and compiler options of the CUDA kernels, for CuPy's NVRTC with or without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

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
    """One source file with its headers put in, each once: CuPy keys its cache of compiled modules by this text."""
    put_in: set[str] = set()

    def text_of(name: str) -> str:
        put_in.add(name)
        text = (source_folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda include: "" if include[1] in put_in else text_of(include[1]), text)

    return text_of(name)


def compile_options(variant: Variant) -> tuple[str, ...]:
    """NVRTC options of a variant, without the architecture and what CuPy adds."""
    # At its default level the assembler keeps so many loads in flight that a few registers spill.
    options = ("--std=c++17", "--ptxas-options=--register-usage-level=0")
    return (*options, *(f"-D{name}={value}" for name, value in variant.defines.items()))


def compiler_key(variant: Variant, arch: str) -> str:
    """What the compiled code of a variant depends on: sources, options, architecture, the compiler's version."""
    from cupy.cuda import nvrtc

    options = " ".join((*compile_options(variant), *CUPY_OPTIONS, arch))
    return f"{nvrtc.getVersion()} {options}\n{source_text(variant.source)}"


@contextmanager
def _compiled(variant: Variant, options: tuple[str, ...]) -> Iterator[Any]:
    """NVRTC's program of a variant, compiled as CuPy does; raises RuntimeError with the log where that fails."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source_text(variant.source), variant.source, (), ())
    try:
        nvrtc.compileProgram(program, (*compile_options(variant), *CUPY_OPTIONS, *options))
        yield program
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{variant}, {options[0]}: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def compile_cubin(variant: Variant, arch: str) -> tuple[bytes, str]:
    """Compile a variant as CuPy does, for an architecture such as "sm_90", on any machine.

    Returns the cubin and ptxas's log.

    Raises RuntimeError with the compiler's log where it fails, ImportError without CuPy.
    """
    from cupy.cuda import nvrtc

    with _compiled(variant, (f"--gpu-architecture={arch}", "--ptxas-options=-v")) as program:
        # CuPy leaves off the last byte, which is a NUL.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)


def compile_ptx(variant: Variant, arch: str) -> str:
    """Compile a variant as CuPy does, for a virtual architecture such as "compute_90", to the text of its PTX.

    Raises RuntimeError with the compiler's log where it fails, ImportError without CuPy.
    """
    from cupy.cuda import nvrtc

    with _compiled(variant, (f"--gpu-architecture={arch}",)) as program:
        return nvrtc.getPTX(program).decode().rstrip("\0")
