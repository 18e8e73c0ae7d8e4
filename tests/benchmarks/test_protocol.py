"""The rules of a study of quality: grids that grow, halving, plans and what they drop, corrected p-values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from benchmarks.protocol import MOST_RATES, STARTUP, Field, Part, Protocol, fit_into, next_rate, parts, rate_grid, rungs
from benchmarks.scoring import DATA_SETS
from benchmarks.study import holm, paired_p
from gspn_dit.errors import UserError
from gspn_dit.sweep.halving import Rung


def test_a_grid_is_geometric_around_its_middle() -> None:
    assert rate_grid(0.008, 5) == [0.002, 0.004, 0.008, 0.016, 0.032]
    assert rate_grid(0.008, 3) == [0.004, 0.008, 0.016]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5, 3, 1, 2, 4], None),
        ([1, 2, 3, 4, 5], 0.001),
        ([5, 4, 3, 2, 1], 0.064),
        ([5, 4, 3, 2, math.inf], None),
        ([1, math.inf, math.inf, math.inf, math.inf], 0.001),
    ],
)
def test_a_best_at_an_end_extends_the_grid(scores: list[float], expected: float | None) -> None:
    assert next_rate(dict(zip(rate_grid(0.008, 5), scores, strict=True))) == expected


def test_a_grid_does_not_grow_for_ever_and_needs_one_training_that_ends() -> None:
    falling = {0.001 * 2**power: -float(power) for power in range(MOST_RATES)}
    assert next_rate(falling) is None
    assert next_rate({rate: falling[rate] for rate in list(falling)[:-1]}) == 0.512
    assert next_rate({0.001: math.inf, 0.002: math.inf}) == 0.0005
    with pytest.raises(UserError, match=r"all trainings diverged, at learning rates 0.001, .*, 0.512; look at their"):
        next_rate(dict.fromkeys(falling, math.inf))


def test_halving_keeps_half_for_twice_the_steps() -> None:
    assert rungs(8, 1024) == [Rung(8, 256), Rung(4, 512), Rung(2, 1024)]
    assert rungs(6, 1024) == [Rung(6, 256), Rung(3, 512), Rung(2, 1024)]
    assert rungs(2, 1024) == [Rung(2, 1024)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3·0.01; then 2·0.03; then 1·0.04, but no less than the one before
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
        ([0.04, 0.001, 0.04, 0.02], [0.08, 0.004, 0.08, 0.06]),
    ],
)
def test_holm_by_hand(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected)


def rows(**figures: list[float]) -> list[dict[str, Any]]:
    return [
        {"variant": name, "seed": seed, "fd": fd} for name, values in figures.items() for seed, fd in enumerate(values)
    ]


def test_the_p_value_of_a_ratio() -> None:
    """Logarithms 1 and 3: mean 2, standard error 1, t = 2 of one degree of freedom: p = 1 - 2·atan(2)/π."""
    found = paired_p(rows(a=[math.e, math.e**3], b=[1.0, 1.0]), "fd", "a", "b")
    assert found == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert paired_p(rows(a=[2.0], b=[1.0]), "fd", "a", "b") == 1
    assert paired_p(rows(a=[1.0, 2.0], b=[1.0, 2.0]), "fd", "a", "b") == 1


PROTOCOL = Protocol()
EACH = 75 + 25


def fields(**contenders: int) -> list[Field]:
    """Data sets of 75 seconds, whose scoring takes 25, by the number of who takes part."""
    digits = DATA_SETS["digits"]
    return [
        Field(dataclasses.replace(digits, name=name, seconds=75, scoring_seconds=25), tuple("abcdef"[:count]))
        for name, count in contenders.items()
    ]


def test_a_plan_by_hand() -> None:
    """Three contenders: 8 settings at a quarter, 4 at a half, 2 whole are 6 trainings' worth of steps in 14 cells; six
    learning rates of what they choose follow.
    """
    found = {(part.data, part.name): part for part in parts(PROTOCOL, fields(a=3, b=3))}
    cells = {name: part.cells for (data, name), part in found.items() if data == "a"}
    assert cells == {
        "learning rates of the defaults": 3 * 6,
        "options by halving, and their learning rates": 3 * 20,
        "1×, equal time": 3 * 5,
        "1×, equal steps": 2 * 5,
        "4×, learning rates": 3 * 4,
        "4×, equal time": 3 * 5,
        "4×, equal steps": 2 * 5,
        "16×, equal time": 3 * 5,
        "16×, equal steps": 2 * 5,
    }
    assert not [name for data, name in found if data == "b" and name.startswith("16")]
    options = found["a", "options by halving, and their learning rates"]
    assert options.seconds == pytest.approx(75 * 12 / 20 + STARTUP)
    assert found["a", "4×, learning rates"].seconds == 4 * 75 + STARTUP
    assert found["a", "4×, equal time"].seconds == 4 * 75 + 25
    assert found["a", "1×, equal time"].hours == pytest.approx(15 * EACH / 3600)
    wide = Protocol(widest="b", search_seeds=2)
    other = {(part.data, part.name): part for part in parts(wide, fields(a=6, b=6))}
    assert other["b", "16×, equal time"].cells == 3 * 5  # the reference and two
    assert ("a", "16×, equal time") not in other
    assert other["a", "learning rates of the defaults"].cells == 6 * 6 * 2


def test_what_does_not_fit_is_dropped_in_order_and_seeds_never() -> None:
    every = parts(PROTOCOL, fields(a=3, b=3))
    whole = sum(part.hours for part in every)
    assert fit_into(every, whole, 1) == (every, [])
    assert fit_into(every, whole / 2, 2) == (every, [])
    kept, dropped = fit_into(every, sum(part.hours for part in every if part.rank == 0) + 1e-9, 1)
    assert [(part.data, part.name) for part in dropped] == [
        ("a", "16×, equal steps"),
        ("b", "4×, equal steps"),
        ("a", "4×, equal steps"),
        ("a", "16×, equal time"),
        ("b", "1×, equal steps"),
        ("a", "1×, equal steps"),
        ("b", "4×, learning rates"),
        ("a", "4×, learning rates"),
        ("b", "4×, equal time"),
        ("a", "4×, equal time"),
        ("b", "options by halving, and their learning rates"),
        ("a", "options by halving, and their learning rates"),
    ]
    assert kept == [part for part in every if part not in dropped]
    assert all(part.cells == 15 for part in kept if "equal time" in part.name)
    with pytest.raises(UserError, match=r"the plan takes \d+\.\d hours at least, but --hours is 1; give more hours"):
        fit_into(every, 1, 1)


def test_what_a_study_can_do_without_is_dropped_first() -> None:
    every = parts(PROTOCOL, fields(a=3, b=2))
    assert {part.cells for part in every if part.name == "1×, equal time"} == {3 * 5, 2 * 5}
    _, dropped = fit_into(every, 1e9, 1, ["equal-steps", "options"])
    assert {part.name for part in dropped} == {
        "options by halving, and their learning rates",
        *(f"{budget}×, equal steps" for budget in (1, 4, 16)),
    }


def test_nothing_more_is_dropped_than_must_be() -> None:
    every = [Part("a", "x", 36, 100, rank=1), Part("a", "y", 36, 100), Part("a", "z", 36, 100, rank=2)]  # 1 h each
    assert [part.name for part in fit_into(every, 2.5, 1)[1]] == ["z"]
    assert [part.name for part in fit_into(every, 1.5, 1)[1]] == ["z", "x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 4}, "--seeds is 4, but a fair study needs at least 5"),
        ({"rates": 3}, "--rates is 3, but a fair study needs at least 5"),
        ({"rates": 6}, "--rates is 6, but must be odd, so that a grid has a middle"),
        ({"trials": 1}, "--trials is 1, but a fair study needs at least 2"),
        ({"search_seeds": 0}, "--search-seeds is 0, but a fair study needs at least 1"),
        ({"finalists": 0}, "--finalists is 0, but a fair study needs at least 1"),
        ({"budgets": (4, 16)}, "--budgets is 4 16, but must rise from 1, such as 1 4 16"),
        ({"budgets": (1, 4, 4)}, "--budgets is 1 4 4, but must rise from 1"),
    ],
)
def test_no_unfair_protocol(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Protocol(**options)
