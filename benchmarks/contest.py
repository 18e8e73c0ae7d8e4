"""The cells of a study of quality on one data set: searches on seeds that are not scored, then the scored ones.

`benchmarks.quality` is the command, `benchmarks.protocol` its rules, `benchmarks.contenders` who takes part.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import calibration, scoring
from benchmarks.contenders import (
    CONTENDERS,
    REFERENCE,
    TOLERANCE,
    Setting,
    describe,
    fitted,
    parameters,
    reference_parameters,
    train_words,
)
from benchmarks.protocol import (
    CENTRE,
    KINDS,
    SEARCH,
    SEARCH_SEED,
    Field,
    Protocol,
    part_name,
    rate_grid,
    rungs,
    tried_rates,
)
from benchmarks.study import call, commit, once, train
from gspn_dit.errors import UserError
from gspn_dit.sweep.halving import survivors

DRIFT = 0.05
"""By which a contender's time of a step, over the reference's, may differ after the last cell from before the first."""
SEARCH_ROUNDS = 12
"""Timed steps of each setting that may be tried; of those that are scored there are `calibration.ROUNDS`."""
DIVERGED = "non-finite loss"
"""What a training says that gave up for it."""


@dataclass(frozen=True)
class Cell:
    """One training: everything about it that differs between cells of a data set."""

    data: scoring.DataSet
    contender: str
    setting: Setting
    rate: float
    steps: int
    seed: int

    @property
    def searches(self) -> bool:
        """Whether it chooses and is not scored."""
        return self.seed >= SEARCH_SEED

    def directory(self, work: Path, size: str) -> Path:
        place = work / self.data.name / f"{self.contender}-{size}" / (describe(self.setting) or "defaults")
        return place / f"{self.steps}-steps" / f"rate-{self.rate:g}" / f"seed-{self.seed}"

    def arguments(self, size: str) -> list[str]:
        """Return the command line of `train.py`, but for the run's directory."""
        values: dict[str, Any] = {
            "seed": self.seed,
            "training.max_steps": self.steps,
            "training.learning_rate": self.rate,
            "training.ema_decay": 0.99,
            "training.warmup_steps": max(1, self.steps // 10),
            "training.checkpoint_every": max(self.steps // 4, 1),
            "training.validate_every": self.steps,
            "training.sample_every": self.steps,
            "training.trackers": "[]",
            "sampling.steps": 1,
            "sampling.per_class": 1,
        }
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        model = train_words(fitted(self.contender, self.setting, self.data, size))
        return [*self.data.arguments(), *model, *words]


def run_cell(cell: Cell, work: Path, size: str) -> dict[str, Any]:
    """Train a cell, and score it if it is not of a search, in processes of their own, and return its figures.

    What is there is kept. A training that diverges is a result, too: its figures are infinite.
    """
    directory, setting = cell.directory(work, size), cell.data.setting
    result = directory / "result.json"
    scoring.refuse_other_scores(result, setting)
    figures = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if not figures.get("diverged"):
        metrics = trained(cell, directory, size)
        if metrics is None:
            once(result, lambda: {"diverged": True, "setting": setting})
        elif cell.searches:
            once(result, lambda: {"val_loss": metrics["val_loss"], "setting": setting})
    if not result.exists():
        words = ["-m", "benchmarks.scoring", str(directory.absolute()), *cell.data.scoring_arguments()]
        call(words, directory / "log.txt")
    if not figures:
        print(f"{directory}: {told(json.loads(result.read_text(encoding='utf-8')))}", flush=True)
    figures = json.loads(result.read_text(encoding="utf-8"))
    del figures["setting"]
    row = {"variant": cell.contender, "options": dict(cell.setting), "rate": cell.rate, "steps": cell.steps}
    return {**row, "seed": cell.seed, "commit": commit(directory / "run"), "diverged": False, **figures}


def told(figures: dict[str, Any]) -> str:
    """Return a cell's figures in short."""
    if figures.get("diverged"):
        return "diverged"
    loss = f"loss {figures['val_loss']:.4f}"
    return f"FD {figures['fd']:.3f}, {loss}" if "fd" in figures else loss


def trained(cell: Cell, directory: Path, size: str) -> dict[str, Any] | None:
    """Train a cell in a directory, unless it is there, and return its last metrics; None if it diverged."""
    try:
        return train(cell.arguments(size), directory / "run")
    except UserError:
        log = directory / "run.log"
        if not log.exists() or DIVERGED not in log.read_text(encoding="utf-8"):
            raise
        return None


def score_of(row: dict[str, Any]) -> float:
    """Return what a search minimises: the logarithm of the validation loss, infinite for a training that diverged."""
    loss = row.get("val_loss")
    return math.log(loss) if loss is not None and math.isfinite(loss) else math.inf


class Study:
    """The cells of one data set, and what was found on it."""

    def __init__(self, field: Field, protocol: Protocol, work: Path, jobs: int) -> None:
        self.data, self.contenders, self.reference = field.data, field.contenders, field.reference
        self.protocol, self.work = protocol, work
        self.free = threading.Semaphore(jobs)
        """Processes that may be begun."""
        self.failure: BaseException | None = None
        """What stopped one; no other begins after it."""
        self.times: dict[tuple[str, Setting], float] = {}
        self.rows: dict[Cell, dict[str, Any]] = {}
        self.roles: dict[Cell, list[str]] = {}

    # -- cells -------------------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell], role: str) -> list[dict[str, Any]]:
        """Return the figures of cells, running those that are not there; `role` says what for, in the result."""
        missing = [cell for cell in dict.fromkeys(cells) if cell not in self.rows]
        self.rows.update(zip(missing, at_once(self._run_one, missing), strict=True))
        for cell in cells:
            self.roles.setdefault(cell, []).append(role)
        return [self.rows[cell] for cell in cells]

    def _run_one(self, cell: Cell) -> dict[str, Any]:
        with self.free:
            if self.failure is not None:
                raise self.failure
            try:
                return run_cell(cell, self.work, self.protocol.size)
            except BaseException as error:
                self.failure = error
                raise

    def calibrate(self, chosen: Sequence[tuple[str, Setting]], name: str, rounds: int) -> dict[str, float]:
        """Return milliseconds of the processor for a step of each, taken in turn, kept in a file of that name."""
        size = self.protocol.size
        words = {
            f"{one} {describe(setting)}": Cell(self.data, one, setting, CENTRE, 100, 0).arguments(size)
            for one, setting in chosen
        }
        file = self.work / self.data.name / f"{name}-{size}.json"
        return calibration.calibrated(file, words, rounds, time.process_time, self.data.buckets)

    def time_steps(self, chosen: Sequence[tuple[str, Setting]], name: str, rounds: int) -> None:
        """Fix how long a step of each takes."""
        found = self.calibrate(chosen, name, rounds)
        self.times.update({key: found[f"{key[0]} {describe(key[1])}"] for key in chosen})

    def steps(self, contender: str, setting: Setting, budget: float = 1) -> int:
        """Return the steps that fit into a budget."""
        return max(1, int(1e3 * self.data.seconds * budget / self.times[contender, setting]))

    # -- search ------------------------------------------------------------------------------------------------------

    def trial(self, contender: str, setting: Setting, rates: Sequence[float], steps: int, role: str) -> list[float]:
        """Return the score of a setting at each learning rate, the mean over the search's seeds."""
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.protocol.search_seeds)
        cells = [Cell(self.data, contender, setting, rate, steps, seed) for rate in rates for seed in seeds]
        scores = [score_of(row) for row in self.run(cells, role)]
        return [sum(scores[i : i + len(seeds)]) / len(seeds) for i in range(0, len(scores), len(seeds))]

    def best_rate(
        self, contender: str, setting: Setting, grid: Sequence[float], steps: int, role: str
    ) -> dict[str, Any]:
        """Try a grid of learning rates, and what lies beyond its better end, until the best lies inside."""
        found = tried_rates(grid, lambda rates: self.trial(contender, setting, rates, steps, role))
        best = min(found, key=lambda rate: found[rate])
        inside = min(found) < best < max(found)
        return {
            "steps": steps,
            "best": best,
            "inside": inside,
            "loss": {f"{rate:g}": _plain(found[rate]) for rate in sorted(found)},
        }

    def search(self, contender: str, kept: set[str]) -> dict[str, Any]:
        """Choose the options and learning rates of a contender, on seeds that are not scored."""
        settings = CONTENDERS[contender].settings(self.protocol.trials if SEARCH[1] in kept else 1)
        grid = rate_grid(CENTRE, self.protocol.rates)
        first = self.best_rate(contender, settings[0], grid, self.steps(contender, settings[0]), SEARCH[0])
        rounds, chosen, rates = [], settings[0], {1: first}
        if SEARCH[1] in kept:
            rounds, chosen = self.halve(contender, settings, first["best"])
            grid = rate_grid(first["best"], self.protocol.rates)
            rates[1] = self.best_rate(contender, chosen, grid, self.steps(contender, chosen), SEARCH[1])
        for budget in self.protocol.budgets[1:2]:
            if (name := part_name(budget, "learning rates")) in kept:
                grid = rate_grid(rates[1]["best"], 3)
                rates[budget] = self.best_rate(contender, chosen, grid, self.steps(contender, chosen, budget), name)
        tried = [dict(setting) for setting in settings]
        return {"settings": tried, "first_rates": first, "rounds": rounds, "chosen": chosen, "rates": rates}

    def halve(self, contender: str, settings: Sequence[Setting], rate: float) -> tuple[list[dict[str, Any]], Setting]:
        """Train ever fewer settings for ever longer; return the losses of each round, and the setting that is left."""
        rounds, alive = [], list(range(len(settings)))
        for rung in rungs(len(settings), 1024):
            share, scores = rung.images / 1024, {}
            for number in alive[: rung.candidates]:
                steps = self.steps(contender, settings[number], share)
                scores[number] = self.trial(contender, settings[number], [rate], steps, SEARCH[1])[0]
            rounds.append({"share_of_steps": share, "loss": {str(n): _plain(score) for n, score in scores.items()}})
            alive = survivors(scores, len(scores))
        return rounds, settings[alive[0]]

    # -- scores ------------------------------------------------------------------------------------------------------

    def score(self, found: dict[str, Any], kept: set[str]) -> list[dict[str, Any]]:
        """Train and score every contender at every budget; return the rows."""
        rows = []
        for number, budget in enumerate(self.protocol.budgets):
            models = self.finalists(found) if number >= 2 else list(self.contenders)
            for kind in KINDS:
                if (name := part_name(budget, kind)) in kept:
                    rows += self.run(self.scored_cells(models, found, budget, kind), name)
        return rows

    def scored_cells(self, models: Sequence[str], found: dict[str, Any], budget: int, kind: str) -> list[Cell]:
        """Return the cells of a budget, seed by seed; a budget without learning rates of its own takes the last's."""
        cells = []
        for seed in range(self.protocol.seeds):
            for contender in models:
                chosen, rates = found[contender]["chosen"], found[contender]["rates"]
                rate = rates[max(known for known in rates if known <= budget)]["best"]
                timed = self.reference if kind == "equal steps" else contender
                steps = self.steps(timed, found[timed]["chosen"], budget)
                cells.append(Cell(self.data, contender, chosen, rate, steps, seed))
        return cells

    def finalists(self, found: dict[str, Any]) -> list[str]:
        """Return the best by the search's own scores, which choose and are not reported, and the reference."""

        def last_score(contender: str) -> float:
            last = found[contender]["rates"][max(found[contender]["rates"])]
            return last["loss"][f"{last['best']:g}"]

        others = sorted((name for name in self.contenders if name != self.reference), key=last_score)
        return [self.reference, *others[: self.protocol.finalists]]


def _plain(score: float) -> float | None:
    """Return the loss of a score, as JSON has it: null for infinite."""
    return None if math.isinf(score) else math.exp(score)


def refuse_unequal(rows: Sequence[dict[str, Any]], data: scoring.DataSet, size: str) -> None:
    """Raise UserError where models that were trained differ from what was planned, or too far from the reference."""
    for row in rows:
        if row["diverged"]:
            continue
        setting = tuple(row["options"].items())
        planned = parameters(data, fitted(row["variant"], setting, data, size))
        target = reference_parameters(data, size)
        if row["parameters"] != planned or abs(planned / target - 1) > TOLERANCE:
            raise UserError(
                f"{row['variant']} on {data.name} has {row['parameters']:,} parameters, but {planned:,} were planned "
                f"and {REFERENCE} has {target:,}; mend the classes and channels in benchmarks/scoring.py"
            )


def drift(before: dict[str, float], after: dict[str, float], reference: str) -> dict[str, float]:
    """Return by what share each one's time over the reference's has changed."""
    return {name: (after[name] / after[reference]) / (before[name] / before[reference]) - 1 for name in before}


def at_once(do: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return what a function returns of each item, all at once in threads; the first failure is raised."""
    if not items:
        return []
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(do, items))


def study_of(field: Field, protocol: Protocol, kept: set[str], work: Path, jobs: int) -> dict[str, Any]:
    """Search and score on one data set; return what was found.

    Contenders search beside each other, so that no process is idle while one of them extends its grid.
    """
    study, data, contenders = Study(field, protocol, work, jobs), field.data, field.contenders
    trials = protocol.trials if SEARCH[1] in kept else 1
    tried = [(name, setting) for name in contenders for setting in CONTENDERS[name].settings(trials)]
    study.time_steps(tried, "calibration-search", SEARCH_ROUNDS)
    found = dict(zip(contenders, at_once(lambda name: study.search(name, kept), contenders), strict=True))
    chosen = [(name, found[name]["chosen"]) for name in contenders]
    study.time_steps(chosen, "calibration", calibration.ROUNDS)
    refuse_unequal(study.score(found, kept), data, protocol.size)
    before, after = (study.calibrate(chosen, name, calibration.ROUNDS) for name in ("calibration", "recheck"))
    moved = drift(before, after, f"{field.reference} {describe(found[field.reference]['chosen'])}")
    for name in contenders:
        found[name]["model"] = fitted(name, found[name]["chosen"], data, protocol.size)
        found[name]["chosen"] = dict(found[name]["chosen"])
    cells = sorted(study.roles, key=lambda cell: cell.directory(work, protocol.size))  # not as threads happened to end
    trials = [{**study.rows[cell], "for": study.roles[cell]} for cell in cells]
    return {
        "tokens": data.tokens,
        "seconds": data.seconds,
        "samples": data.samples,
        "milliseconds_per_step": before,
        "milliseconds_per_step_at_the_end": after,
        "drift": moved,
        "time_held": all(abs(share) <= DRIFT for share in moved.values()),
        "search": found,
        "cells": trials,
    }
