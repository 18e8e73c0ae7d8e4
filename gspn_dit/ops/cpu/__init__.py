"""The CPU kernels of the operator pair."""

from gspn_dit.ops.cpu.binding import output_memory

__all__ = ["output_memory"]
