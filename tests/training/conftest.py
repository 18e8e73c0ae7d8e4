"""A tiny training run, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from gspn_dit.config import Config, TrainArguments, config_from_dict


def tiny_config(output_dir: Path, **training: Any) -> Config:
    """A model of a few thousand weights on 2×2 tokens of the digits; keywords override `training` keys."""
    settings = {
        "max_steps": 4,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "log_every": 1,
        "checkpoint_every": 2,
        "sample_every": 100,
        "validate_every": 100,
        "validation_images": 16,
        "keep_last": 10,
        "trackers": [],
        **training,
    }
    return config_from_dict(
        {
            "output_dir": str(output_dir),
            "model": {"name": "GSPN-N/4", "hidden_size": 16, "depth": 2},
            "sampling": {"steps": 2, "per_class": 1, "max_classes": 2},
            "training": settings,
        }
    )


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """Return a config with keys of sections replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def run_training(config: Config, resume: str | None = None, overwrite: bool = False) -> None:
    """Train in this process, with a fresh Accelerator."""
    from gspn_dit.training.loop import train

    AcceleratorState._reset_state(reset_partial_state=True)
    train(TrainArguments(config, resume, overwrite))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; no test shall see another's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
