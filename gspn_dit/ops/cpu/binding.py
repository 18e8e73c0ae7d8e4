"""The CPU kernels of the operator pair: a compiled library where one was built, else `lines`.

The library (`csrc/`) is plain C++, loaded with ctypes at the first call. It holds the kernels for every instruction set
and runs on torch's own OpenMP threads. Results depend on the instruction set, but neither on the number of threads nor
on the batch that a sample travels in.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from gspn_dit.ops import lines
from gspn_dit.ops.backends import BackendUnavailableError
from gspn_dit.ops.contract import STORAGE_DTYPES
from gspn_dit.ops.cpu.memory import OutputMemory

__all__ = ["available_kernels", "chosen_kernels", "describe", "output_memory", "scan_backward", "scan_forward"]

KERNELS_VARIABLE = "GSPN_CPU_KERNELS"
"""Environment variable that names the kernels, one of `KERNELS`; without it the fastest that can run are used."""

KERNELS = ("pytorch", "baseline", "avx2", "avx512", "amx")
"""The line-by-line kernels, and the compiled ones for each instruction set, which a processor has up to some point.

What "amx" adds is in the projected scan of bfloat16; all else runs the kernels of "avx512".
"""

BLOCK = 0
"""Channels per task of the compiled kernels; 0 lets them choose."""

STREAM_BYTES = 32 << 20
"""Gradients of at least as many bytes are written past the caches: what reads them next would not find them there."""

output_memory = OutputMemory()
"""Where large outputs live; `output_memory.release()` returns what is idle to the system."""

MAX_DIRECTIONS = 4
_INSTRUCTION_SETS = {
    "baseline": "baseline vectors",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "amx": "AVX-512, AMX in bfloat16",
}
_INPUTS = ("x", "weight_logits", "input_gate", "output_gate", "grad_y")
_OUTPUTS = ("y", "grad_x", "grad_weight_logits", "grad_input_gate", "grad_output_gate")
_INSTALL = "for the compiled ones install a C++ compiler (g++ or clang++) and run `pip install .` or `pip install -e .`"


class _Call(ctypes.Structure):
    """`gspn::Scan` of csrc/scan.h, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "height", "width", "channels", "groups", "directions", "window")
        ),
        *((name, ctypes.c_int64) for name in ("dtype", "instruction_set", "threads", "block", "stream_bytes")),
        ("direction", ctypes.c_int64 * MAX_DIRECTIONS),
        ("merge", ctypes.c_double * MAX_DIRECTIONS),
        ("x_stride", ctypes.c_int64 * 3),
        ("grad_y_stride", ctypes.c_int64 * 3),
        ("weight_logits_stride", ctypes.c_int64 * 5),
        ("input_gate_stride", ctypes.c_int64 * 4),
        ("output_gate_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in (*_INPUTS, *_OUTPUTS)),
        ("grad_merge", ctypes.POINTER(ctypes.c_double)),
        ("parallel", ctypes.c_void_p),
    ]


_INTERFACE = ctypes.sizeof(_Call) * 1000 + 1
"""Must equal the library's, or the library is older than this file."""


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and why."""
    folder = Path(__file__).resolve().parents[1]
    candidates = [folder / f"_cpu_scan{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        return None, _INSTALL
    try:
        library = ctypes.CDLL(str(path))
        for function in (library.gspn_interface, library.gspn_best_instruction_set):
            function.restype = ctypes.c_int64
        if library.gspn_interface() != _INTERFACE:
            return None, "the compiled ones are out of date: run the installation again"
    except (OSError, AttributeError) as error:
        return None, f"the compiled ones cannot be loaded ({error}): run the installation again"
    return library, ""


def available_kernels() -> tuple[str, ...]:
    """Return those of `KERNELS` that can run here, the slowest first."""
    library, _ = load()
    return KERNELS[:1] if library is None else KERNELS[: library.gspn_best_instruction_set() + 2]


def chosen_kernels() -> str:
    """Return which of `KERNELS` a scan uses; raise BackendUnavailableError if `GSPN_CPU_KERNELS` names others."""
    available = available_kernels()
    chosen = os.environ.get(KERNELS_VARIABLE) or available[-1]
    if chosen not in available:
        why = f" ({load()[1]})" if len(available) == 1 else ""
        raise BackendUnavailableError(
            f"{KERNELS_VARIABLE} is {chosen!r}, but what can run here is {', '.join(available)}{why}: "
            "unset it or name one of these"
        )
    return chosen


@lru_cache(maxsize=1)
def torch_parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch has loaded, or None.

    A second runtime would bring a second pool of threads, which spins against the first.
    """
    for name in ("libtorch_cpu.so", "libtorch.so"):
        path = Path(torch.__file__).with_name("lib") / name
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def describe() -> str:
    """Say in one line which CPU kernels run here, and what would make them faster."""
    chosen = chosen_kernels()
    if chosen != "pytorch":
        return f"compiled kernels ({_INSTRUCTION_SETS[chosen]})"
    why = f" ({KERNELS_VARIABLE}=pytorch)" if os.environ.get(KERNELS_VARIABLE) else f"; {load()[1]}"
    return f"line-by-line PyTorch kernels{why}"


def instruction_set() -> int:
    """Return the code of the instruction set of the chosen kernels, which must be compiled ones."""
    return list(_INSTRUCTION_SETS).index(chosen_kernels())


def _library() -> ctypes.CDLL | None:
    """Return the library unless the line-by-line kernels were chosen."""
    return None if chosen_kernels() == "pytorch" else load()[0]


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its innermost dimension does not have stride 1."""
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _call(
    inputs: dict[str, Tensor], merge_weight: Tensor, directions: Sequence[int], window: int, outputs: dict[str, Tensor]
) -> _Call:
    x = inputs["x"]
    call = _Call()
    call.batch, call.height, call.width, call.channels = x.shape
    call.groups, call.directions = inputs["weight_logits"].shape[-1], len(directions)
    call.window = window or max(call.height, call.width)
    call.dtype = STORAGE_DTYPES.index(x.dtype)
    call.instruction_set = instruction_set()
    call.threads, call.block, call.stream_bytes = torch.get_num_threads(), BLOCK, STREAM_BYTES
    call.direction[: len(directions)] = list(directions)
    call.merge[: len(directions)] = merge_weight.detach().double().tolist()
    for name, tensor in inputs.items():
        getattr(call, f"{name}_stride")[:] = tensor.stride()[:-1]
        setattr(call, name, tensor.data_ptr())
    for name, tensor in outputs.items():
        setattr(call, name, tensor.data_ptr())
    call.parallel = torch_parallel()
    return call


def _run(function: ctypes._CFuncPtr, call: _Call) -> None:  # type: ignore[name-defined]
    if function(ctypes.byref(call)):
        raise MemoryError("gspn_scan could not allocate its scratch memory")


def scan_forward(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the scan for checked arguments; direction codes, `window` 0 for global; returns x's shape and dtype."""
    library = _library()
    if library is None or x.numel() == 0:
        return lines.scan_forward(x, weight_logits, input_gate, output_gate, merge_weight, directions, window)
    tensors = (x, weight_logits, input_gate, output_gate)
    inputs = {name: dense(tensor) for name, tensor in zip(_INPUTS, tensors)}
    (y,) = output_memory.empty([x.shape], x.dtype)
    _run(library.gspn_scan_forward, _call(inputs, merge_weight, directions, window, {"y": y}))
    return y


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight_logits, input_gate, output_gate and merge_weight, each like its input."""
    library = _library()
    tensors = (x, weight_logits, input_gate, output_gate, grad_y)
    if library is None or x.numel() == 0:
        return lines.scan_backward(grad_y, *tensors[:4], merge_weight, directions, window)
    inputs = {name: dense(tensor) for name, tensor in zip(_INPUTS, tensors)}
    results = output_memory.empty([tensor.shape for tensor in tensors[:4]], x.dtype)
    call = _call(inputs, merge_weight, directions, window, dict(zip(_OUTPUTS[1:], results)))
    grad_merge = (ctypes.c_double * MAX_DIRECTIONS)()
    call.grad_merge = ctypes.cast(grad_merge, ctypes.POINTER(ctypes.c_double))
    _run(library.gspn_scan_backward, call)
    merge = torch.tensor(grad_merge[: len(directions)], dtype=merge_weight.dtype)
    return results[0], results[1], results[2], results[3], merge
