"""The study of few steps: what is trained from what and for how long, and how figures are compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import few_step
from benchmarks.few_step import RECIPES, STEPS, Recipe, arguments, judged, seconds_in_all, steps_of, summary
from benchmarks.scoring import DATA_SETS
from gspn_dit.config import parse_train_arguments

FAIR = [f"{name}, {way}" for name in ("flow_map", "mean_flow") for way in ("from scratch", "half + half")]


def test_equal_time_counts_the_teacher() -> None:
    assert {name: seconds_in_all(name) for name in RECIPES} == {
        **{"velocity": 1, "velocity, half": 0.5},
        **dict.fromkeys(FAIR, 1),
        **{f"{name}, twice as long": 2 for name in ("flow_map", "mean_flow")},
    }
    assert steps_of(Recipe("flow_map", 1 / 2), 40, {"flow_map": 100.0, "velocity": 1.0}) == 200


def test_recipes_differ_in_what_they_learn_from_alone(tmp_path: Path) -> None:
    velocity, distilled, scratch = (
        parse_train_arguments(arguments(recipe, 40, 3, teacher)).config
        for recipe, teacher in (
            (RECIPES["velocity"], None),
            (RECIPES["flow_map, half + half"], tmp_path),
            (RECIPES["flow_map, from scratch"], None),
        )
    )
    assert (velocity.objective.name, distilled.objective.name) == ("velocity", "flow_map")
    assert distilled.objective == scratch.objective and distilled.objective.guidance_scale == few_step.GUIDANCE_SCALE
    assert distilled.training.initialize_from == str(tmp_path) and scratch.training.initialize_from is None
    first, second = velocity.to_dict(), scratch.to_dict()
    assert first.pop("objective") != second.pop("objective") and first == second
    assert first["seed"] == 3 and first["training"]["max_steps"] == 40


def test_emoji_take_the_place_of_the_digits() -> None:
    recipe, emoji = RECIPES["flow_map, from scratch"], DATA_SETS["emoji"].at("/emoji", "/run")
    digits, colour = (
        parse_train_arguments(arguments(recipe, 40, 3, None, data)).config for data in (DATA_SETS["digits"], emoji)
    )
    assert (colour.data.name, colour.data.path, colour.model.name) == ("imagefolder", "/emoji", "DiT-N/4")
    assert colour.objective == digits.objective and colour.training.max_steps == 40


def test_recipes_bring_their_teachers() -> None:
    assert few_step.with_teachers(["mean_flow, half + half"]) == ["velocity, half", "mean_flow, half + half"]
    assert few_step.with_teachers(["flow_map, twice as long", "velocity"]) == ["velocity", "flow_map, twice as long"]


def test_teachers_come_first_and_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained: dict[str, list[str]] = {}
    monkeypatch.setattr(few_step, "train", lambda words, run: trained.update({run.name: words}) or {"step": 1})
    done = few_step.train_all(list(RECIPES), tmp_path, 2, dict.fromkeys(RECIPES, 10))
    teacher = str(tmp_path / "seed-2" / "velocity-half")
    assert teacher in trained["mean_flow-half-+-half"] and teacher not in trained["mean_flow-twice-as-long"]
    assert list(trained)[:2] == ["velocity", "velocity-half"] and done["velocity"] == (
        tmp_path / "seed-2" / "velocity",
        {"step": 1},
    )


def cells() -> list[dict[str, Any]]:
    """FD in 50 steps is 1 and 2 by seed; the others' are 2 and 4, or 1 and 8, by number of steps."""
    found = []
    for name in RECIPES:
        for steps in few_step.steps_to_score(name):
            values = {50: (1.0, 2.0), 1: (1.0, 8.0)}.get(steps, (2.0, 4.0))
            row = {"recipe": name, "sampling_steps": steps, "class_agreement": 0.9 if "half" in name else 0.96}
            found += [{**row, "seed": seed, "fd": fd} for seed, fd in enumerate(values)]
    return found


def test_ratios_are_to_many_steps_of_the_same_seed() -> None:
    """Ratios 1 and 4 have the geometric mean 2, with Student's interval of two."""
    found = summary(cells())
    assert found["velocity"]["50"]["fd_ratio"]["mean"] == 1
    assert list(found["velocity"]) == [str(steps) for steps in STEPS]
    one = found["flow_map, from scratch"]["1"]
    assert one["fd"]["mean"] == 4.5 and one["fd_ratio"]["mean"] == pytest.approx(2)
    assert math.log(one["fd_ratio"]["high"] / 2) == pytest.approx(12.7062 * math.log(4) / 2, rel=1e-4)
    assert found["mean_flow, half + half"]["4"]["fd_ratio"]["low"] == pytest.approx(2)


def test_what_was_to_be_shown_is_judged_by_the_best_of_equal_time() -> None:
    speed = {"velocity, 50": {"images_per_second": 10.0}, "flow_map, 1": {"images_per_second": 290.0}}
    rows = judged(summary(cells()), speed)
    assert [(row["value"], row["met"]) for row in rows] == [
        (pytest.approx(2), True),
        (pytest.approx(2), False),
        (pytest.approx(0.96), True),
        (29.0, False),
    ]
    assert rows[2]["recipe"] == "flow_map, from scratch"


def test_what_nothing_has_judged_is_left_out() -> None:
    without = [{key: value for key, value in cell.items() if key != "class_agreement"} for cell in cells()]
    speed = {"velocity, 50": {"images_per_second": 10.0}, "flow_map, 1": {"images_per_second": 290.0}}
    assert [row["target"].split(" / ")[0] for row in judged(summary(without), speed)] == [
        "FD in 1 step",
        "FD in 4 steps",
        "images per second, 1 step",
    ]


def test_a_distilled_run_is_compared_with_many_steps_of_the_packaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fds = {"builtin:digits": {1: 9.0, 2: 5.0, 4: 3.0, 50: 2.0}, tmp_path: {1: 4.0, 2: 3.0, 4: 1.0}}
    monkeypatch.setattr(
        few_step, "score_run", lambda run, steps, seed: {str(count): {"fd": fds[run][count]} for count in steps}
    )
    monkeypatch.setattr(few_step, "speeds", lambda velocity, few: {"of": (velocity, few)})
    found = few_step.compare(tmp_path)
    ratios = {(cell["recipe"], cell["sampling_steps"]): cell["fd_ratio"] for cell in found["cells"]}
    assert ratios[tmp_path.name, 1] == 2 and ratios["builtin:digits", 50] == 1 and len(ratios) == 7
    assert found["speed"] == {"of": ("builtin:digits", tmp_path)}


def test_drawing_is_timed_in_turn_without_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a moves the clock by 5 at first and by 1, 1, 2 later; every call of b by 10."""
    clock, taken = [0.0], {"a": iter([5.0, 1.0, 1.0, 2.0]), "b": iter([10.0] * 4)}

    def run(name: str) -> None:
        clock[0] += next(taken[name])

    monkeypatch.setattr(few_step.time, "process_time", lambda: clock[0])
    found = few_step.time_drawing({name: lambda name=name: run(name) for name in taken}, rounds=3)  # type: ignore[misc]
    assert found["a"] == {"images_per_second": few_step.BATCH, "spread": 1.0}
    assert found["b"] == {"images_per_second": few_step.BATCH / 10, "spread": 0.0}
