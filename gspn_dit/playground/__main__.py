"""Draw with trained models by hand, in a browser.

    python -m gspn_dit.playground --checkpoint runs/demo runs/other

Nothing leaves the machine: the page loads from this process alone, which reports nothing to anybody.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.paths import path_argument
from gspn_dit.sampling_options import choose_device


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises UserError."""
    parser = ArgumentParser(description="Draw by hand, in a browser.")
    parser.add_argument("--checkpoint", nargs="+", type=path_argument, default=["builtin:digits"], metavar="DIR",
                        help="run directories, checkpoints, or builtin:digits")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, … (default: the accelerator if there is one, else cpu)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="0 for a free one")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port is {options.port}, but must lie in [0, {2**16})")
    return options


def main() -> None:
    """Open the checkpoints and serve the page."""
    options = parse_arguments()
    from gspn_dit.playground.server import run_pages, serve
    from gspn_dit.playground.sources import open_sources

    sources = open_sources(options.checkpoint, choose_device(options.device))
    serve(sources, run_pages(options.checkpoint), options.host, options.port)


def cli() -> None:
    """Run the command line."""
    run_cli(main, "the playground is closed")


if __name__ == "__main__":
    cli()
