"""The study of recipes: which rates it tries, what differs between recipes, and its ratios by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipe_tables, recipes
from benchmarks.recipes import BASELINE, RATES, RECIPES, next_rate, summary, train_arguments
from benchmarks.scoring import DATA_SETS
from gspn_dit.config import flatten, parse_train_arguments
from gspn_dit.errors import UserError


def test_rates_are_added_at_the_better_end_until_the_best_lies_inside() -> None:
    found: dict[float, float] = {}
    for expected, distance in zip((*RATES, 3.2e-2, 6.4e-2), (9.0, 7.0, 5.0, 4.0, 6.0), strict=True):
        assert next_rate(found) == expected
        found[expected] = distance
    assert next_rate(found) is None
    assert next_rate(dict(zip(RATES, (1.0, 2.0, 3.0), strict=True))) == RATES[0] / 2
    falling = {rate * 2**power: 10.0 - power for power in range(6) for rate in RATES[:1]}
    with pytest.raises(UserError, match="best of 6 learning rates is still at an end"):
        next_rate(falling)


@pytest.mark.parametrize("data", ["digits", "emoji"])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != BASELINE])
def test_a_recipe_differs_from_the_baseline_in_one_option(recipe: str, data: str) -> None:
    one, other = (
        dict(flatten(parse_train_arguments(train_arguments(name, 1, 0.01, 50, DATA_SETS[data])).config.to_dict()))
        for name in (recipe, BASELINE)
    )
    assert {key for key in one if one[key] != other[key]} == set(RECIPES[recipe])
    assert (one["seed"], one["training.max_steps"], one["training.learning_rate"]) == (1, 50, 0.01)


def cells() -> list[dict[str, Any]]:
    """Two seeds; Muon's distance is half and an eighth of the baseline's."""
    rows = [(BASELINE, 0, 4.0), (BASELINE, 1, 8.0), ("muon", 0, 2.0), ("muon", 1, 1.0)]
    rest = {"class_agreement": 0.5, "recall": 0.25, "rate": 0.008, "steps": 100, "commit": "abc"}
    return [{"variant": variant, "seed": seed, "fd": distance, **rest} for variant, seed, distance in rows]


def test_ratios_are_geometric_means_over_seeds() -> None:
    found = summary(cells())
    assert found["fd_over_baseline"].keys() == {"muon"}
    assert found["fd_over_baseline"]["muon"]["mean"] == pytest.approx(0.25)  # √(1/2 · 1/8)
    assert found["means"][BASELINE]["fd"]["mean"] == 6
    half = 12.7062 * math.log(4) / 2  # t(0.975, 1) · half the distance of two logs
    assert found["fd_over_baseline"]["muon"]["high"] == pytest.approx(0.25 * math.exp(half), rel=1e-4)


def test_a_study_calibrates_searches_and_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps are time over a step's; every recipe trains its seeds at the rate that its search found best."""
    times = {name: 10.0 * (number + 1) for number, name in enumerate(RECIPES)}
    monkeypatch.setattr(recipes.calibration, "calibrated", lambda *_, **__: times)

    def run_cell(recipe: str, seed: int, rate: float, steps: int, *_: Any) -> dict[str, Any]:
        assert steps == int(2000 / times[recipe])
        figures = {"fd": abs(math.log(rate / 8e-3)) + 1 + seed, "class_agreement": 0.5, "recall": 0.5}
        return {"variant": recipe, "seed": seed, "rate": rate, "steps": steps, "commit": "abc", **figures}

    monkeypatch.setattr(recipes, "run_cell", run_cell)
    found = recipes.study(2, 3, tmp_path)
    assert {name: row["best"] for name, row in found["rates"].items()} == dict.fromkeys(RECIPES, 8e-3)
    assert [(cell["variant"], cell["seed"]) for cell in found["cells"]] == [(n, s) for s in range(3) for n in RECIPES]
    text = recipe_tables.recipes_table(found)
    assert "| muon | 0.008 of 0.004, 0.008, 0.016 | 100 | 1.000 [1.000, 1.000] | 2.00 ± 2.5 |" in text
    assert "2 seconds of the processor for each training, 3 paired seeds" in text
