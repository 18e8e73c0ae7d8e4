"""`python -m fid`: score a set of generated images against real ones and write a report."""

from __future__ import annotations

from fid.cli import main
from gspn_dit.errors import run_cli

if __name__ == "__main__":
    run_cli(main, "no report was written")
