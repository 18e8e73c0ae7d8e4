"""How a study of quality is run, before anything is: settings, which learning rate is tried next, what a plan costs.

Everything here is a function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scoring import DataSet
from gspn_dit.errors import UserError
from gspn_dit.sweep.halving import Rung, plan

FACTOR = 2.0
"""Between two learning rates of a grid."""
CENTRE = 8e-3
"""Of the first grid of learning rates."""
MOST_RATES = 10
"""Learning rates of a grid that was extended; if the best is at an end still, the result says so."""
SEARCH_SEED = 100
"""The first seed of trainings that choose and are not scored."""
STARTUP = 10
"""Seconds that a training takes to begin and to end; those that choose are judged by their loss, and draw nothing."""
FEWEST_SEEDS, FEWEST_RATES = 5, 5


@dataclass(frozen=True)
class Protocol:
    """What holds for all contenders and data sets of a study; raises UserError for what would be no fair one."""

    size: str = "N"
    """Preset of the models."""
    seeds: int = 5
    """Scored and paired, from 0 on."""
    search_seeds: int = 1
    """On which learning rates and options are chosen, from `SEARCH_SEED` on."""
    rates: int = 5
    """Learning rates of a grid, before it is extended."""
    trials: int = 8
    """Settings of its options that each contender may try, the defaults among them."""
    budgets: tuple[int, ...] = (1, 4, 16)
    """Multiples of a data set's seconds; beyond the first two, on `widest` alone, for the best and the reference."""
    widest: str | None = None
    """The data set of the largest budgets, where there are more than two; None: the first."""
    finalists: int = 2
    """Contenders that the largest budgets are for, beside the reference."""

    def __post_init__(self) -> None:
        least = {"seeds": FEWEST_SEEDS, "rates": FEWEST_RATES, "search_seeds": 1, "trials": 2, "finalists": 1}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}, but a fair study needs at least {fewest}")
        if self.rates % 2 == 0:
            raise UserError(f"--rates is {self.rates}, but must be odd, so that a grid has a middle")
        rising = all(small < large for small, large in zip(self.budgets, self.budgets[1:]))
        if not self.budgets or self.budgets[0] != 1 or not rising:
            raise UserError(f"--budgets is {' '.join(map(str, self.budgets))}, but must rise from 1, such as 1 4 16")


# -- learning rates and options --------------------------------------------------------------------------------------


def rate_grid(centre: float, count: int) -> list[float]:
    """Return an odd number of learning rates around one, each `FACTOR` times the one before.

    >>> rate_grid(8.0, 5)
    [2.0, 4.0, 8.0, 16.0, 32.0]
    """
    return [centre * FACTOR ** (number - count // 2) for number in range(count)]


def next_rate(found: Mapping[float, float]) -> float | None:
    """Return the learning rate beyond the end at which the best score lies, or None if it lies inside.

    Args:
        found: score by learning rate, the lower the better; infinite where a training diverged.

    Where all diverged, lower ones follow. After `MOST_RATES` there is no other, though the best be at an end.

    Raises:
        UserError: all of `MOST_RATES` diverged.
    """
    best = min(found, key=lambda rate: (found[rate], rate))
    inside = min(found) < best < max(found)
    if len(found) >= MOST_RATES and math.isinf(found[best]):
        tried = ", ".join(f"{rate:g}" for rate in sorted(found))
        raise UserError(f"all trainings diverged, at learning rates {tried}; look at their logs")
    if inside or len(found) >= MOST_RATES:
        return None
    return best * FACTOR if best == max(found) else best / FACTOR


def tried_rates(grid: Sequence[float], scores: Callable[[Sequence[float]], Sequence[float]]) -> dict[float, float]:
    """Return the score of each learning rate of a grid, and of those beyond its better end until the best lies inside.

    Args:
        grid: tried at once.
        scores: of learning rates, the lower the better; infinite where a training diverged.
    """
    found = dict(zip(grid, scores(grid), strict=True))
    while (rate := next_rate(found)) is not None:
        found[rate] = scores([rate])[0]
    return found


def rungs(trials: int, steps: int) -> list[Rung]:
    """Return the rounds of a successive halving: how many settings are trained, and for how many steps (`images`).

    Half of the settings are kept from one round to the next, for twice as many steps, from a quarter of them on.
    """
    return plan(trials, steps, max(1, steps // 4), 2, 1)


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A data set of a study, and who takes part there."""

    data: DataSet
    contenders: tuple[str, ...]

    @property
    def reference(self) -> str:
        """A rival, by whose steps and times the others' are told."""
        return self.contenders[0]


@dataclass(frozen=True)
class Part:
    """Cells of a plan that are run or dropped together."""

    data: str
    name: str
    cells: int
    seconds: float
    """Of the processor for one, its scoring included."""
    rank: int = 0
    """When it is dropped, the highest first; 0: never."""

    @property
    def hours(self) -> float:
        """Of one core."""
        return self.cells * self.seconds / 3600


KINDS = ("equal time", "equal steps")
"""Of scored cells."""


def part_name(budget: int, kind: str) -> str:
    """Return the name of a part; `kind` is one of `KINDS` or "learning rates"."""
    return f"{budget}×, {kind}"


SEARCH = ("learning rates of the defaults", "options by halving, and their learning rates")
"""Names of the parts that choose at the smallest budget."""
RANKS = {"learning rates": (0, 5, 0), "equal time": (0, 4, 7), "equal steps": (6, 8, 9)}
"""Ranks of the first budget, the second and the larger ones; see `Part.rank`."""
RANK_OF_OPTIONS = 3
UNWANTED: dict[str, Callable[[str], bool]] = {
    "options": lambda name: name == SEARCH[1],
    "early-scores": lambda name: name in [part_name(1, kind) for kind in KINDS],
    "equal-steps": lambda name: name.endswith("equal steps"),
}
"""Kinds of parts that a study can do without, by what `--drop` calls them; told by a part's name."""


def parts(protocol: Protocol, fields: Sequence[Field]) -> list[Part]:
    """Return everything that a study would run, its searches first.

    Equal steps are taken to last as long as equal time: what a step takes is measured later. A grid of learning rates
    is taken to be extended once.
    """
    widest = protocol.widest or fields[0].data.name
    return [part for field in fields for part in _parts(protocol, field, widest)]


def _parts(protocol: Protocol, field: Field, widest: str) -> Iterator[Part]:
    data, contenders = field.data.name, len(field.contenders)
    seconds, scoring = field.data.seconds, field.data.scoring_seconds
    search = contenders * protocol.search_seeds
    yield Part(data, SEARCH[0], search * (protocol.rates + 1), seconds + STARTUP)
    rounds = rungs(protocol.trials, 1024)
    trained = sum(rung.candidates * rung.images for rung in rounds) / rounds[-1].images + protocol.rates + 1
    count = sum(rung.candidates for rung in rounds) + protocol.rates + 1
    yield Part(data, SEARCH[1], search * count, seconds * trained / count + STARTUP, RANK_OF_OPTIONS)
    for number, budget in enumerate(protocol.budgets):
        place = min(number, 2)
        if place == 2 and data != widest:
            continue
        models = contenders if place < 2 else min(contenders, protocol.finalists + 1)
        cells = {
            "learning rates": search * (3 + 1) if place == 1 else 0,
            "equal time": models * protocol.seeds,
            "equal steps": (models - 1) * protocol.seeds,  # the reference's are those of equal time
        }
        for kind, amount in cells.items():
            if amount:
                name = part_name(budget, kind)
                each = budget * seconds + (STARTUP if kind == "learning rates" else scoring)
                yield Part(data, name, amount, each, RANKS[kind][place])


def fit_into(
    every: Sequence[Part], hours: float, cores: int, unwanted: Sequence[str] = ()
) -> tuple[list[Part], list[Part]]:
    """Return the parts of a plan that are run within hours of so many cores, and those that are dropped for it.

    Those of the `UNWANTED` kinds are dropped in any case. Of the others equal steps at the largest budgets go first,
    then those at the middle one, the largest budgets, equal steps at the smallest one, the middle one's own learning
    rates, the middle one, and the search of options, without which all have their defaults; of equals the last data
    set's. Seeds are never dropped.

    Raises:
        UserError: what may not be dropped is too much.
    """
    dropped = [part for part in every if any(UNWANTED[kind](part.name) for kind in unwanted)]
    kept = [part for part in every if part not in dropped]
    while sum(part.hours for part in kept) > hours * cores:
        number = max(range(len(kept)), key=lambda index: (kept[index].rank, index))
        if kept[number].rank == 0:
            needed = sum(part.hours for part in kept) / cores
            raise UserError(
                f"the plan takes {needed:.1f} hours at least, but --hours is {hours:g}; give more hours or jobs, fewer "
                "--contenders, --data or --trials, or fewer --seconds"
            )
        dropped.append(kept.pop(number))
    return kept, dropped


def as_json(part: Part) -> dict[str, Any]:
    """Return plain JSON values."""
    return {"data": part.data, "part": part.name, "cells": part.cells, "core_hours": round(part.hours, 3)}
