"""The CUDA kernels of the operator pair, launched through CuPy."""

from __future__ import annotations


def problem() -> str | None:
    """Return why the CuPy backend cannot run here and what to do, or None if it can."""
    return (
        "this version has no CUDA kernels yet: use backend='auto' (the PyTorch reference on CUDA tensors), "
        "or move the tensors to the CPU"
    )
