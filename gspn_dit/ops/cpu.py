"""The CPU kernels of the operator pair."""

from __future__ import annotations

from gspn_dit.ops.lines import scan_backward, scan_forward

__all__ = ["describe", "scan_backward", "scan_forward"]


def describe() -> str:
    """Say in one line which CPU kernels run here, and what would make them faster."""
    return "line-by-line PyTorch kernels"
