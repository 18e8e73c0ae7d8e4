"""Draw images by class or by prompt from a checkpoint, into a grid, PNG files or one .npz.

    python sample.py --checkpoint runs/demo --classes 0-9 --per-class 8 --out grid.png
    python sample.py --checkpoint RUN --prompt "a red circle" --out grid.png

`python sample.py --help` describes every flag.
"""

from gspn_dit.errors import run_cli
from gspn_dit.sample import parse_arguments, run

if __name__ == "__main__":
    run_cli(lambda: run(parse_arguments()), "what was written is whole")
