"""The command line of `train.py` and `gspn-train`: the trainer, which knows no evaluation, and a distance to watch."""

from __future__ import annotations

import sys

from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import UserError, run_cli


def main() -> None:
    """Parse, then import what training needs, so that --help and mistakes answer at once."""
    arguments = parse_train_arguments()  # answers a shell that asks how to complete, too
    if not sys.argv[1:]:  # the defaults are a model of 137 million parameters: nothing to start by accident
        raise UserError("nothing says what to train; give --config FILE, or keys such as --model.name (see --help)")
    if arguments.dry_run:
        from gspn_dit.training.dry_run import dry_run

        dry_run(arguments.config)
        return
    from fid.quick import load_scorer
    from gspn_dit.training.loop import train

    train(arguments, load_scorer)


def cli() -> None:
    """The command `gspn-train`."""
    run_cli(main, "--resume auto resumes from the last checkpoint")


if __name__ == "__main__":
    cli()
