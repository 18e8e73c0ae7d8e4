"""Experiment trackers by name; each is optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from gspn_dit.config import Config, flatten
from gspn_dit.errors import UserError

PROJECT = "gspn-dit"
FOLDER = "trackers"
"""Directory of the run in which they write."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError with the command that installs it for a tracker whose package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"training.trackers has {missing[0]}, which is not installed; pip install {' '.join(missing)}, "
            "or leave it out: the run directory's index.html shows the same curves"
        )


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Start the trackers of a run on the main process."""
    names = config.training.trackers
    if not accelerator.is_main_process or not names:
        return
    title, folder = Path(config.output_dir).name, Path(config.output_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    options = {"wandb": {"name": title, "dir": str(folder)}, "trackio": {"name": title}}
    hosted = set(names) - {"tensorboard"}
    settings = {key: str(value) for key, value in flatten(config.to_dict())} if hosted else None
    accelerator.init_trackers(PROJECT, settings, {name: options[name] for name in hosted})
