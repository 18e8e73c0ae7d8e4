"""Draw images by class or by prompt from a checkpoint, into a grid, PNG files or one .npz.

    python sample.py --checkpoint runs/demo --classes 0-9 --per-class 8 --out grid.png
    python sample.py --checkpoint RUN --prompt "a red circle" --out grid.png

`python sample.py --help` describes every flag. An installation has it as `gspn-sample`.
"""

from gspn_dit.sample import cli

if __name__ == "__main__":
    cli()
