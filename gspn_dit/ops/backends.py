"""Which implementation runs a scan, and why another cannot."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

import torch

from gspn_dit.ops.cuda import binding as cuda

BACKENDS = ("auto", "reference", "cpu", "cupy")
OVERRIDE_VARIABLE = "GSPN_SCAN_BACKEND"
"""Environment variable that stands in for `backend="auto"`, for experiments and tests."""


class BackendUnavailableError(RuntimeError):
    """A backend was named that cannot run here; the message says why and what to install."""


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return "reference" or "operator" (the registered pair) for a backend name and the tensors' device.

    Raises ValueError for an unknown name or a backend of another device, BackendUnavailableError for one that is
    named but cannot run. "auto" falls back to the reference, with one warning per process.
    """
    if backend == "auto":
        backend = os.environ.get(OVERRIDE_VARIABLE, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed are {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference"
    if device.type == "meta" or (device.type == "cpu" and backend in ("auto", "cpu")):
        return "operator"
    if backend == "cpu":
        raise ValueError(f"backend 'cpu' needs CPU tensors, but x is on {device}")
    if backend == "cupy" and device.type != "cuda":
        raise ValueError(f"backend 'cupy' needs CUDA tensors, but x is on {device}")
    problem = cuda.problem() if device.type == "cuda" else f"no kernel is written for {device.type} tensors"
    if problem is None:
        return "operator"
    if backend == "cupy":
        raise BackendUnavailableError(f"backend 'cupy' cannot run: {problem}")
    if not torch.compiler.is_compiling():
        _warn_once(f"gspn_scan falls back to the slow PyTorch reference: {problem}")
    return "reference"
