"""Train a model: `accelerate launch train.py --config configs/NAME.yaml`. An installation has it as `gspn-train`."""

from gspn_dit.train import cli

if __name__ == "__main__":
    cli()
