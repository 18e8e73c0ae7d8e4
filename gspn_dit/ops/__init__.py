"""The GSPN scan: one operator, `gspn_scan`, with several implementations behind it.

Nothing in this package imports the rest of `gspn_dit`; CuPy is imported only when a CUDA tensor asks for it.
"""

from gspn_dit.ops.backends import BackendUnavailableError
from gspn_dit.ops.contract import DIRECTIONS
from gspn_dit.ops.projected import gspn_scan_from_proxy
from gspn_dit.ops.scan import gspn_scan

__all__ = ["DIRECTIONS", "BackendUnavailableError", "gspn_scan", "gspn_scan_from_proxy"]
