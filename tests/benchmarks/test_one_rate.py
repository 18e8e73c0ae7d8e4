"""The study of quality: budgets, which cells are run, and that every variant is a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import one_rate
from benchmarks.one_rate import VARIANTS, Cell, budgets_of, run_cell, train_arguments
from benchmarks.scoring import DATA_SETS
from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import UserError
from gspn_dit.models import create_model


def test_seconds_become_steps_and_the_first_models_steps_a_second_budget() -> None:
    options = SimpleNamespace(variants=["gspn", "attention"], seconds=30, steps=None)
    assert budgets_of(options, {"gspn": 100.0, "attention": 80.0}) == {
        "30 s": {"gspn": 300, "attention": 375},
        "300 steps": {"gspn": 300, "attention": 300},
    }
    options = SimpleNamespace(variants=["gspn", "attention"], seconds=None, steps=7)
    assert budgets_of(options, {}) == {"7 steps": {"gspn": 7, "attention": 7}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_model(variant: str) -> None:
    config = parse_train_arguments(train_arguments("digits", variant, "N", 3, 40)).config
    assert (config.seed, config.training.max_steps, config.training.warmup_steps) == (3, 40, 4)
    assert create_model(config.model.name, 10, 1, 8, **config.model.overrides())


CELL = Cell("digits", "gspn", "N", 0, 40)
SETTING = DATA_SETS["digits"].setting


def make_cell(work: Path, **changes: Any) -> Path:
    """What a scored cell leaves."""
    directory = CELL.directory(work)
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps({"fd": 1.5, "setting": SETTING} | changes))
    return directory


def test_a_cell_that_is_done_is_not_scored_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_cell(tmp_path)
    monkeypatch.setattr(one_rate, "train", lambda words, run: {"commit": "0123456", "step": 40})
    monkeypatch.setattr(one_rate, "call", lambda *_: pytest.fail("it ran"))
    row = {"fd": 1.5, "variant": "gspn", "seed": 0, "steps": 40, "commit": "0123456"}
    assert run_cell(CELL, tmp_path) == row


def test_a_cell_that_was_scored_otherwise_is_refused(tmp_path: Path) -> None:
    directory = make_cell(tmp_path, setting={**SETTING, "steps": 99})
    with pytest.raises(UserError, match=f"{directory} was scored with other settings; delete it"):
        run_cell(CELL, tmp_path)
