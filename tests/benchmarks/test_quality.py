"""The study of quality: budgets, calibration, which cells are run, and that every variant is a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality import SETTING, VARIANTS, Cell, budgets_of, calibrated, run_cell, train_arguments
from gspn_dit.config import parse_train_arguments, save_config
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


def test_a_calibration_is_kept_when_variants_are_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def measure(data: str, variants: list[str], size: str, work: Path) -> dict[str, float]:
        asked.append(variants)
        return {name: 10.0 * len(asked) for name in variants}

    monkeypatch.setattr(quality, "milliseconds_per_step", measure)
    assert calibrated("digits", ["a", "b"], "N", tmp_path) == {"a": 10.0, "b": 10.0}
    assert calibrated("digits", ["b"], "N", tmp_path) == {"a": 10.0, "b": 10.0}
    assert calibrated("digits", ["c"], "N", tmp_path) == {"a": 10.0, "b": 10.0, "c": 20.0}
    assert asked == [["a", "b"], ["c"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_model(variant: str, tmp_path: Path) -> None:
    config = parse_train_arguments(train_arguments("digits", variant, "N", 3, 40, tmp_path)).config
    assert (config.seed, config.training.max_steps, config.training.warmup_steps) == (3, 40, 4)
    assert create_model(config.model.name, 10, 1, 8, **config.model.overrides())


CELL = Cell("digits", "gspn", "N", 0, 40)


def make_cell(work: Path, **changes: Any) -> Path:
    """What a trained and scored cell leaves."""
    directory = CELL.directory(work)
    (directory / "run").mkdir(parents=True)
    train = train_arguments(CELL.data, CELL.variant, CELL.size, CELL.seed, CELL.steps, directory / "run")
    save_config(parse_train_arguments(train).config, directory / "run" / "config.yaml")
    environment = {"git_commit": "0123456789abcdef", "git_changes": True}
    (directory / "run" / "environment.json").write_text(json.dumps(environment))
    (directory / "result.json").write_text(json.dumps({"fd": 1.5, "setting": SETTING} | changes))
    return directory


def test_a_cell_that_is_done_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_cell(tmp_path)
    monkeypatch.setattr(quality, "_call", lambda *_: pytest.fail("it ran"))
    row = {"fd": 1.5, "variant": "gspn", "seed": 0, "steps": 40, "commit": "0123456-dirty"}
    assert run_cell(CELL, tmp_path) == row


@pytest.mark.parametrize("what", ["learning rate", "scoring"])
def test_a_cell_of_other_settings_is_refused(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = make_cell(tmp_path, **({"setting": {**SETTING, "steps": 99}} if what == "scoring" else {}))
    if what == "learning rate":
        monkeypatch.setattr(quality, "LEARNING_RATE", 1e-5)
    with pytest.raises(UserError, match=f"{directory} was trained or scored with other settings; delete it"):
        run_cell(CELL, tmp_path)
