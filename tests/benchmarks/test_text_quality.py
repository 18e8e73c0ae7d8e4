"""The study of text-to-image: budgets and figures from cells."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import text_quality
from benchmarks.text_judge import colours
from benchmarks.text_quality import SCORES, arguments, budgets, steady_rate, summary
from fid.retrieval import retrieved
from gspn_dit.config import parse_train_arguments


def test_seconds_become_steps_of_each_mixer_and_the_first_ones_for_all() -> None:
    assert budgets(30, {"gspn": 300.0, "attention": 400.0}) == {
        "equal time": {"gspn": 100, "attention": 75},
        "equal steps": {"gspn": 100, "attention": 100},
    }


def test_steps_that_take_as_long_make_one_budget_of_both() -> None:
    both = {"gspn": 100, "attention": 100}
    assert budgets(30, {"gspn": 300.0, "attention": 310.0}) == {"equal time": both, "equal steps": both}


@pytest.mark.parametrize(
    "losses, best, at_an_end",
    [
        ([3.0, 2.0, 1.0, 9.0], 2, False),  # the best one stands beside one that diverged
        ([3.0, 1.0, 1.1, 9.0], 2, False),
        ([3.0, 2.0, 1.1, 1.0], 4, True),  # the grid is too low
        ([1.0, 1.1, 9.0, 9.0], 1, True),
        ([1.0, 9.0, 9.0, 9.0], 1, True),  # no rate has a steady neighbour
        ([1.0], 1, True),
    ],
)
def test_a_rate_is_taken_where_the_next_higher_one_trains_as_well(
    losses: list[float], best: float, at_an_end: bool
) -> None:
    tried = dict(zip((1, 2, 4, 8), losses, strict=False))
    assert steady_rate(tried) == {"losses": tried, "best": best, "at_an_end": at_an_end}


def test_the_mixers_differ_in_nothing_else() -> None:
    options = SimpleNamespace(data="data/emoji", table=None)
    configs = [
        parse_train_arguments(arguments(options, 40, 3, 1e-3, mixer=mixer)).config.to_dict()
        for mixer in text_quality.MIXERS
    ]
    assert [config["unet"].pop("mixer") for config in configs] == ["gspn", "attention"]
    assert configs[0] == configs[1]
    assert configs[0]["seed"] == 3 and configs[0]["training"]["max_steps"] == 40


def cell(variant: str, seed: int, fd: float, retrieval: float) -> dict[str, Any]:
    values = {score: fd if score.startswith("fd_") else retrieval for score in SCORES}
    return {"variant": variant, "seed": seed, "val_loss": fd, **values}


def test_ratios_and_differences_are_of_pairs() -> None:
    """Ratios 2 and 8, whose geometric mean is 4; differences 0.1 and 0.3, with Student's interval of two."""
    cells = [
        cell("gspn", 1, 2, 0.2),
        cell("attention", 1, 1, 0.1),
        cell("gspn", 2, 8, 0.4),
        cell("attention", 2, 1, 0.1),
    ]
    found = summary(cells)
    assert found["ratios"]["fd_pairs"]["mean"] == pytest.approx(4)
    assert found["ratios"]["val_loss"]["pairs"] == 2
    difference = found["differences"]["retrieval_train"]
    assert difference["mean"] == pytest.approx(0.2)
    assert difference["high"] - 0.2 == pytest.approx(12.7062 * math.sqrt(0.02) / math.sqrt(2), rel=1e-4)
    assert found["means"]["attention"]["fd_train"]["mean"] == 1


def test_pictures_of_their_own_colours_are_the_nearest() -> None:
    """Of two pictures, red at the left and red at the right, darker and noisy copies are nearer to their own."""
    red = np.zeros((2, 8, 8, 3), np.uint8)
    red[0, :, :4, 0] = red[1, :, 4:, 0] = 200
    noise = np.random.default_rng(0).integers(0, 40, red.shape, dtype=np.uint8)
    drawn = colours(red // 2 + noise)
    assert drawn.shape == (2, 48)
    assert retrieved(drawn, colours(red), ["left", "right"]).all()
    assert not retrieved(drawn.flip(0), colours(red), ["left", "right"]).any()
