"""Runs launches with what NVRTC makes of the kernels for a GPU, translated to C++ and built with g++."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.host.ptx.grammar import parse
from gspn_dit.ops.cuda.host.ptx.translate import translate
from gspn_dit.ops.cuda.sources import compile_ptx, compiler_key
from gspn_dit.ops.cuda.types import Launch, Variant

HERE = Path(__file__).resolve().parent
_FLAGS = ["-w", f"-I{HERE}", "-ffp-contract=off", "-frounding-math", "-fwrapv"]
"""Integers wrap round in PTX, and rounding modes change."""


def _texts() -> list[str]:
    files = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *harness.HERE.glob("*.h")])
    return [file.read_text(encoding="utf-8") for file in files]


def cached_ptx(variant: Variant, arch: str) -> str:
    """The PTX of a variant, compiled once for each version of the sources and the compiler; see `compile_ptx`."""
    file = harness.cache_folder() / f"{harness.digest(compiler_key(variant, arch))}.ptx"
    if not file.exists():
        partial = file.with_suffix(".partial")
        partial.write_text(compile_ptx(variant, arch), encoding="utf-8")
        partial.replace(file)
    return file.read_text(encoding="utf-8")


@functools.cache
def translated(ptx: str) -> ctypes.CDLL:
    """Translate PTX, build it with the runtime and load it; raises PtxError for instructions that are not known."""
    text = translate(parse(ptx))
    source = harness.cache_folder() / f"ptx-{harness.digest(text)}.cpp"
    source.write_text(text, encoding="utf-8")
    parts = [HERE / name for name in ("memory.cpp", "warp.cpp", "launch.cpp")]
    # Not optimised: a module has ten thousands of lines, and runs for seconds.
    objects = [harness.compile_object(source, ["-O0", *_FLAGS], [text, *_texts()])]
    objects += [harness.compile_object(part, ["-O2", *_FLAGS], _texts()) for part in parts]
    built = harness.load(objects)
    built.host_cuda_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return built


class PtxHost(harness.Host):
    """A `Host` that runs NVRTC's PTX in place of the sources' own C++, and checks every access.

    A launch fails with RuntimeError, and the line of the PTX, for what is misaligned, lies outside of the launch's
    tensors and shared memory, or reads shared memory that nobody has written.
    """

    def __init__(
        self,
        arch: str = "compute_90",
        schedule: int = 0,
        change: Callable[[str], str] = lambda ptx: ptx,
        unwritten_fails: bool = True,
    ) -> None:
        """`change` edits the PTX first: to plant a fault. Without `unwritten_fails` such reads give NaN."""
        super().__init__(schedule=schedule)
        self.arch, self.change, self.unwritten_fails = arch, change, unwritten_fails

    def library(self, variant: Variant) -> ctypes.CDLL:
        """The kernels of a variant, translated."""
        return translated(self.change(cached_ptx(variant, self.arch)))

    def __call__(self, launch: Launch, problem: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Run one launch, which may touch the tensors given and nothing else."""
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        addresses, lengths = (
            (ctypes.c_uint64 * len(storages))(*numbers)
            for numbers in ([s.data_ptr() for s in storages], [s.nbytes() for s in storages])
        )
        library = self.library(launch.variant)
        library.host_cuda_memory(addresses, lengths, len(storages))
        library.host_cuda_unwritten_fails(int(self.unwritten_fails))
        super().__call__(launch, problem, tensors)
