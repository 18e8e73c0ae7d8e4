"""The search for a block: its rounds over losses that are a formula, its trainings at equal time, its command."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import block, calibration, contest
from benchmarks.block import PARTS, SCANS, Candidate, Search, Trainings, candidates, over
from benchmarks.block_tables import block_table, rates_table
from benchmarks.contenders import fitted, train_words
from benchmarks.protocol import SEARCH_SEED
from benchmarks.scoring import DATA_SETS
from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import UserError

DIGITS = DATA_SETS["digits"]
MACHINE = {"processor": "a chip", "cores": 2, "kernels": "kernels (AVX2)"}
GOOD, BETTER, SPOILT, BAD = "SwiGLU", "positions", "RMS norms", "no lpu"
WORTH = {GOOD: 0.9, BETTER: 0.8, SPOILT: 0.95, BAD: 1.2}


def find(name: str) -> Candidate:
    return next(one for one in candidates(SCANS) if one.name == name)


class Losses:
    """A part alone multiplies the loss by its worth; the spoilt one makes it worse beside another."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, float, int]] = Counter()

    def __call__(self, one: Candidate, name: str, rate: float, share: float, seed: int) -> float:
        self.calls[one.name, share, seed] += 1
        parts = one.name.split(" + ")
        loss = math.prod(WORTH.get(part, 1.0) for part in parts)
        if SPOILT in parts and len(parts) > 1:
            loss *= 1.2
        best = 0.064 if one.name == GOOD else 0.016
        return (2.0 if name == "far" else 1.0) * loss * (1 + 0.1 * abs(math.log2(rate / best))) / share


def searched(kept: int) -> tuple[dict[str, Any], Losses]:
    losses = Losses()
    tried = [find(name) for name in (SCANS, BAD, GOOD, BETTER, SPOILT)]
    return Search(["near", "far"], losses).run(tried, kept), losses


def test_base_has_its_own_rate_and_parts_are_judged_beside_it() -> None:
    found, losses = searched(kept=3)
    assert {name: min(grid, key=lambda rate: grid[rate]) for name, grid in found["base"]["rates"].items()} == {
        "near": 0.016,
        "far": 0.016,
    }
    alone = {row["block"]: row["over_base"] for row in found["alone"]}
    assert alone == pytest.approx({SCANS: 1, BETTER: 0.8, GOOD: 0.9 * 1.2, SPOILT: 0.95, BAD: 1.2})
    assert losses.calls[BAD, 0.5, SEARCH_SEED] == 2  # one rate on each data set, and no second round
    assert losses.calls[BAD, 1.0, SEARCH_SEED] == 0


def test_best_have_the_whole_time_and_rates_of_their_own() -> None:
    found, losses = searched(kept=3)
    assert [row["block"] for row in found["best"]] == [BETTER, GOOD, SPOILT]
    assert {row["block"]: row["over_base"] for row in found["best"]}[GOOD] == pytest.approx(
        0.9
    )  # at four times the rate
    assert losses.calls[GOOD, 1.0, SEARCH_SEED] == 2 * (3 + 2)  # beyond the three, until the best lies inside
    assert losses.calls[BETTER, 1.0, SEARCH_SEED] == 2 * 3


def test_parts_join_while_the_loss_falls() -> None:
    found, _ = searched(kept=3)
    steps = {row["block"]: (round(row["over_base"], 6), row["stays"]) for row in found["together"]}
    both = f"{BETTER} + {GOOD}"
    assert steps == {BETTER: (0.8, True), both: (0.72, True), f"{both} + {SPOILT}": (round(0.72 * 1.14, 6), False)}
    assert found["winner"]["options"] == {**dict(find(SCANS).setting), **PARTS[SCANS][GOOD], **PARTS[SCANS][BETTER]}


def test_two_parts_that_name_one_option_do_not_join() -> None:
    worth = {"gates of 2": 0.8, "gates of ½": 0.9}
    tried = [find(name) for name in (SCANS, *worth)]

    def loss(one: Candidate, name: str, rate: float, share: float, seed: int) -> float:
        return worth.get(one.name, 1.0) * (1 + abs(math.log2(rate / 0.008)))

    found = Search(["near"], loss).run(tried, kept=2)
    assert [row["block"] for row in found["together"]] == ["gates of 2"]


def test_winner_is_compared_with_seeds_that_chose_nothing() -> None:
    found, losses = searched(kept=3)
    winner = found["winner"]
    assert winner["over_base"] == pytest.approx(0.72)
    assert [(row["data"], row["seed"]) for row in winner["seeds"]] == [
        (name, SEARCH_SEED + number) for name in ("near", "far") for number in (1, 2)
    ]
    assert losses.calls[SCANS, 1.0, SEARCH_SEED + 1] == 2


def test_parts_may_have_the_whole_grid_of_rates() -> None:
    losses = Losses()
    found = Search(["near"], losses).at_all_rates([find(name) for name in (SCANS, BAD, GOOD)])
    assert [(row["block"], row["over_base"]) for row in found["best"]] == [
        (GOOD, pytest.approx(0.9)),
        (SCANS, 1),
        (BAD, pytest.approx(1.2)),
    ]
    # Five rates each, and on beyond the better end, where the last one is worse.
    assert losses.calls == {(name, 1.0, SEARCH_SEED): count for name, count in ((SCANS, 5), (BAD, 5), (GOOD, 7))}


def test_block_that_diverges_goes_no_further() -> None:
    def loss(one: Candidate, name: str, rate: float, share: float, seed: int) -> float:
        return math.inf if one.name == GOOD else Losses()(one, name, rate, share, seed)

    found = Search(["near"], loss).run([find(SCANS), find(GOOD), find(SPOILT)], kept=1)
    assert [row["block"] for row in found["best"]] == [SPOILT]
    assert over({"near": math.inf}, {"near": 1.0}) == math.inf


@pytest.mark.parametrize("one", [one for base in PARTS for one in candidates(base)], ids=str)
def test_every_block_has_the_parameters_of_attention(one: Candidate) -> None:
    options = fitted(one.contender, one.setting, DIGITS, "N")  # raises where it has not
    parse_train_arguments(["--config", DIGITS.config, *train_words(options)])


@pytest.mark.parametrize("contender", PARTS)
def test_parts_change_the_base(contender: str) -> None:
    tried = {one.name: one.setting for one in candidates(contender)}
    base = fitted(contender, tried[contender], DIGITS, "N")
    for name, part in PARTS[contender].items():
        changed = fitted(contender, tried[name], DIGITS, "N")
        assert any(base.get(key) != changed.get(key) for key in part), name


class Trained:
    """Trainings that take no time; those of a learning rate above .02 diverge."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(contest, "train", self.train)
        monkeypatch.setattr(block, "commit", lambda _: "abcdef0")
        monkeypatch.setattr(calibration, "milliseconds_per_step", self.milliseconds)

    def train(self, words: Sequence[str], run: Path) -> dict[str, Any]:
        self.count += 1
        values = dict(zip(words[::2], words[1::2], strict=True))
        if float(values["--training.learning_rate"]) > 0.02:
            run.parent.mkdir(parents=True, exist_ok=True)
            run.with_name("run.log").write_text(contest.DIVERGED)
            raise UserError("failed")
        return {"val_loss": 1 / int(values["--training.max_steps"])}

    def milliseconds(self, words: Mapping[str, Sequence[str]], *_: Any) -> dict[str, float]:
        names = list(words)
        # as long as all in turn for the first of them, and 100 for each other one
        return {name: 100.0 if number else 50.0 * len(names) for number, name in enumerate(names)}


def test_trainings_have_equal_time_and_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Trained(monkeypatch)
    trainings = Trainings(candidates(SCANS), [DIGITS], "N", tmp_path, jobs=1)
    base = len(candidates(SCANS)) * 50.0
    assert trainings.loss(find(SCANS), "digits", 0.01, 1.0, 100) == 1 / int(1e3 * DIGITS.seconds / base)
    assert trainings.loss(find(GOOD), "digits", 0.01, 0.5, 100) == 1 / int(0.5e3 * DIGITS.seconds / 100)
    assert trainings.loss(find(GOOD), "digits", 0.04, 0.5, 100) == math.inf
    # What joins parts is timed beside the base: as long as that, in its first time's unit.
    joined = find(GOOD).joined("both", PARTS[SCANS][BETTER])
    assert trainings.milliseconds(joined, "digits") == base
    again = Trainings(candidates(SCANS), [DIGITS], "N", tmp_path, jobs=1)
    assert again.loss(find(GOOD), "digits", 0.04, 0.5, 100) == math.inf
    assert world.count == 3


def test_command_writes_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trained(monkeypatch)
    out = tmp_path / "block.json"
    words = ["--data", "digits", "--seconds", "10", "--jobs", "2", "--work", str(tmp_path / "work"), "--out", str(out)]
    block.main(words)
    found = json.loads(out.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert found["data"] == {"digits": {"tokens": 16, "seconds": 10}}
    assert {row["block"] for row in found["alone"]} == {one.name for one in candidates(SCANS)}
    assert {cell["commit"] for cell in found["cells"]} == {"abcdef0"}
    text = block_table({**found, "machine": MACHINE})
    assert text.count("\n| ") == 1 + len(found["alone"]) + 2 + len(found["together"]) and "Trained at abcdef0." in text


def test_command_gives_named_parts_all_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trained(monkeypatch)
    out = tmp_path / "block.json"
    words = ["--own-rates", BAD, "U-shape", "--data", "digits", "--work", str(tmp_path / "work"), "--out", str(out)]
    block.main(words)
    found = json.loads(out.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert set(found["parts"].values()) == {SCANS, BAD, "U-shape"} == {row["block"] for row in found["best"]}
    head, _, *rows = rates_table({**found, "machine": MACHINE}).split("\n\n")[0].splitlines()
    assert "loss at 0.032" in head and len(rows) == 3 and all("diverged" in row for row in rows)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--own-rates", "SwiGLU", "no such"], "--own-rates names 'no such', but takes of .*'no lpu'"),
        (["--jobs", "0"], "--jobs is 0, but must be at least 1"),
        (["--kept", "0"], "--kept is 0, but must be at least 1"),
        (["--seconds", "-1"], "--seconds is -1, but must be a number above 0"),
        (["--size", "XS"], "--size is XS, but must be one of"),
    ],
)
def test_bad_options_are_told(words: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        block.main([*words, "--work", str(tmp_path)])
