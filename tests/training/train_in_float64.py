"""train.py with float64 weights: what many processes sum differs from what one sums by rounding alone."""

import torch

from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import run_cli
from gspn_dit.training.loop import train

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    run_cli(lambda: train(parse_train_arguments()))
