"""Trackers are optional: one that is missing is named before anything is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gspn_dit.config import TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.training.trackers import check_trackers
from tests.training.conftest import run_training, tiny_config


def test_missing_tracker_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match=r"training\.trackers has wandb, which is not installed; pip install wandb"):
        run_training(tiny_config(tmp_path / "run", trackers=["tensorboard", "wandb"]))
    assert not (tmp_path / "run").exists()
    check_trackers(["tensorboard"])
    check_trackers([])


def test_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"training\.trackers has \['mlflow'\], but can hold tensorboard, wandb, trackio"
    ):
        TrainingConfig(trackers=["mlflow"])


def test_tensorboard_gets_what_metrics_get(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(tiny_config(tmp_path, max_steps=2, trackers=["tensorboard"]))
    (events,) = (tmp_path / "trackers").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2]
    assert {"grad_norm", "learning_rate", "val_loss_q4", "peak_memory_bytes"} <= set(read.Tags()["scalars"])
