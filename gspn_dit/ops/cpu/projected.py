"""The fused kernels of the projected scan, and where they run.

Logits, gates and their gradients, 20 values per token and channel, never reach memory: a few positions of 4 to 16
channels are projected in registers and scanned from there (csrc/projected_*.h).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gspn_dit.ops.contract import STORAGE_DTYPES
from gspn_dit.ops.cpu import binding
from gspn_dit.ops.materialised import projected_backward, projected_forward

BLOCK = 0
"""Vectors of channels that a task of the forward reads at a time; 0 lets the kernels choose."""

FUSED_KERNELS = ("avx2", "avx512", "amx")
"""Those of `binding.KERNELS` that have fused ones; with vectors of 4 channels torch's products are faster."""

_WEIGHTS = ("logits_weight", "input_gate_weight", "output_gate_weight", "skip_weight")


class _Call(ctypes.Structure):
    """`gspn::Projected` of csrc/projected.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "proxy_channels", "groups")),
        *((name, ctypes.c_int64) for name in ("directions", "window", "dtype", "instruction_set", "threads", "block")),
        ("direction", ctypes.c_int64 * binding.MAX_DIRECTIONS),
        ("merge", ctypes.c_double * binding.MAX_DIRECTIONS),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("x", "proxy", "grad_y")),
        *((name, ctypes.c_void_p) for name in ("x", "proxy", *_WEIGHTS, "grad_y", "y", "grad_x", "grad_proxy")),
        *((f"grad_{name}", ctypes.c_void_p) for name in _WEIGHTS),
        ("grad_merge", ctypes.POINTER(ctypes.c_double)),
        ("parallel", ctypes.c_void_p),
    ]


_INTERFACE = ctypes.sizeof(_Call) * 1000 + 1
"""Must equal the library's."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """Return the library, or None where there is none or one that is older than this file."""
    library, _ = binding.load()
    with contextlib.suppress(AttributeError):
        if library is not None:
            library.gspn_projected_interface.restype = ctypes.c_int64
            return library if library.gspn_projected_interface() == _INTERFACE else None
    return None


def fused(x: Tensor, proxy: Tensor) -> bool:
    """Say whether the fused kernels run."""
    if x.numel() == 0 or proxy.numel() == 0 or binding.chosen_kernels() not in FUSED_KERNELS:
        return False
    return _library() is not None


def _call(
    x: Tensor, proxy: Tensor, weights: dict[str, Tensor], merge_weight: Tensor, directions: Sequence[int], window: int
) -> _Call:
    """Describe a call up to its outputs and the gradient of y; the tensors must outlive it."""
    call = _Call()
    call.batch, call.height, call.width, call.channels = x.shape
    call.proxy_channels, call.directions = proxy.shape[-1], len(directions)
    call.groups = len(weights["logits_weight"]) // (3 * len(directions))
    call.window = window or max(call.height, call.width)
    call.dtype = STORAGE_DTYPES.index(x.dtype)
    call.instruction_set = binding.instruction_set()
    call.threads, call.block, call.parallel = torch.get_num_threads(), BLOCK, binding.torch_parallel()
    call.direction[: len(directions)] = list(directions)
    call.merge[: len(directions)] = merge_weight.detach().double().tolist()
    call.x_stride[:], call.proxy_stride[:] = x.stride()[:3], proxy.stride()[:3]
    for name, tensor in {"x": x, "proxy": proxy, **weights}.items():
        setattr(call, name, tensor.data_ptr())
    return call


def _inputs(
    x: Tensor, proxy: Tensor, weights: Sequence[Tensor], skip_weight: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    given = [*weights, *([] if skip_weight is None else [skip_weight])]
    plain = {name: weight.detach().resolve_neg().contiguous() for name, weight in zip(_WEIGHTS, given)}
    return binding.dense(x), binding.dense(proxy), plain


def _run(function: str, call: _Call) -> None:
    if getattr(_library(), function)(ctypes.byref(call)):
        raise MemoryError("gspn_scan_from_proxy could not allocate its scratch memory")


def scan_forward(
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the projected scan for checked arguments: the weights of the logits and the two gates, direction codes,
    `window` 0 for global; returns like x.
    """
    if not fused(x, proxy):
        return projected_forward(binding.scan_forward, x, proxy, weights, merge_weight, skip_weight, directions, window)
    x, proxy, named = _inputs(x, proxy, weights, skip_weight)
    call = _call(x, proxy, named, merge_weight, directions, window)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call.y = y.data_ptr()
    _run("gspn_projected_forward", call)
    return y


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the seven tensors in order, each like its input; [0] for a skip weight that is None."""
    if not fused(x, proxy):
        return projected_backward(
            binding.scan_backward, grad_y, x, proxy, weights, merge_weight, skip_weight, directions, window
        )
    grad_y = binding.dense(grad_y)
    x, proxy, named = _inputs(x, proxy, weights, skip_weight)
    call = _call(x, proxy, named, merge_weight, directions, window)
    call.grad_y, call.grad_y_stride[:] = grad_y.data_ptr(), grad_y.stride()[:3]
    results = {
        name: torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for name, tensor in {"x": x, "proxy": proxy, **named}.items()
    }
    for name, tensor in results.items():
        setattr(call, f"grad_{name}", tensor.data_ptr())
    grad_merge = (ctypes.c_double * binding.MAX_DIRECTIONS)()
    call.grad_merge = ctypes.cast(grad_merge, ctypes.POINTER(ctypes.c_double))
    _run("gspn_projected_backward", call)
    merge = torch.tensor(grad_merge[: len(directions)], dtype=merge_weight.dtype)
    grad_skip = results.pop("skip_weight", x.new_empty(0))
    grad_x, grad_proxy, grad_logits, grad_in, grad_out = results.values()
    return grad_x, grad_proxy, grad_logits, grad_in, grad_out, merge, grad_skip
