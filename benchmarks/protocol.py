"""How a study of quality is run, before anything is: settings, which learning rate is tried next, what a plan costs.

Everything here is a function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspn_dit.errors import UserError
from gspn_dit.sweep.halving import Rung, plan

FACTOR = 2.0
"""Between two learning rates of a grid."""
CENTRE = 8e-3
"""Of the first grid of learning rates."""
MOST_RATES = 10
"""Learning rates of a grid that was extended; if the best is at an end still, the study stops and says so."""
SEARCH_SEED = 100
"""The first seed of trainings that choose and are not scored."""
CELL_SECONDS = 25.0
"""Of a cell beside its training: start, samples, scores; for plans alone."""
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
    """The data set of the largest budgets; None: the first."""
    finalists: int = 2
    """Contenders that the largest budgets are for, beside the reference."""
    seconds: float | None = None
    """Of the smallest budget; None: each data set's own."""

    def __post_init__(self) -> None:
        least = {"seeds": FEWEST_SEEDS, "rates": FEWEST_RATES, "search_seeds": 1, "trials": 2, "finalists": 1}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}, but a fair study needs at least {fewest}")
        if self.rates % 2 == 0:
            raise UserError(f"--rates is {self.rates}, but must be odd, so that a grid has a middle")
        if self.seconds is not None and self.seconds <= 0:
            raise UserError(f"--seconds is {self.seconds:g}, but must be above 0")
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

    Raises:
        UserError: the best is at an end still after `MOST_RATES`, or all diverged.
    """
    best = min(found, key=lambda rate: found[rate])
    if math.isinf(found[best]):
        raise UserError(f"all trainings diverged, at learning rates {_listed(found)}; look at their logs")
    if min(found) < best < max(found):
        return None
    if len(found) >= MOST_RATES:
        raise UserError(f"the best of {len(found)} learning rates is still at an end: {_listed(found)}")
    return best * FACTOR if best == max(found) else best / FACTOR


def _listed(found: Mapping[float, float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(found))


def rungs(trials: int, steps: int) -> list[Rung]:
    """Return the rounds of a successive halving: how many settings are trained, and for how many steps (`images`).

    Half of the settings are kept from one round to the next, for twice as many steps, from a quarter of them on.
    """
    return plan(trials, steps, max(1, steps // 4), 2, 1)


# -- the plan --------------------------------------------------------------------------------------------------------


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


def part_name(budget: int, kind: str) -> str:
    """Return the name of a part; `kind` is "equal time", "equal steps" or "learning rates"."""
    return f"{budget}×, {kind}"


SEARCH = ("learning rates of the defaults", "options by halving, and their learning rates")
"""Names of the parts that choose at the smallest budget."""
RANKS = {"learning rates": (0, 5, 0), "equal time": (0, 4, 7), "equal steps": (6, 8, 9)}
"""Ranks of the first budget, the second and the larger ones; see `Part.rank`."""
RANK_OF_OPTIONS = 3


def parts(protocol: Protocol, contenders: int, data: Mapping[str, float]) -> list[Part]:
    """Return everything that a study would run, its searches first.

    Args:
        protocol: of the study.
        contenders: how many there are.
        data: seconds of the smallest budget, by data set.

    Equal steps are taken to last as long as equal time: what a step takes is measured later. A grid of learning rates
    is taken to be extended once.
    """
    first = next(iter(data))
    return [part for name, unit in data.items() for part in _parts(protocol, contenders, name, unit, first)]


def _parts(protocol: Protocol, contenders: int, data: str, unit: float, first: str) -> Iterator[Part]:
    seconds = unit if protocol.seconds is None else protocol.seconds
    search = contenders * protocol.search_seeds
    yield Part(data, SEARCH[0], search * (protocol.rates + 1), seconds + CELL_SECONDS)
    rounds = rungs(protocol.trials, 1024)
    trained = sum(rung.candidates * rung.images for rung in rounds) / rounds[-1].images + protocol.rates + 1
    count = sum(rung.candidates for rung in rounds) + protocol.rates + 1
    yield Part(data, SEARCH[1], search * count, seconds * trained / count + CELL_SECONDS, RANK_OF_OPTIONS)
    for number, budget in enumerate(protocol.budgets):
        place = min(number, 2)
        if place == 2 and data != (protocol.widest or first):
            continue
        models = contenders if place < 2 else min(contenders, protocol.finalists + 1)
        cells = {
            "learning rates": search * 3 if place == 1 else 0,
            "equal time": models * protocol.seeds,
            "equal steps": (models - 1) * protocol.seeds,  # the reference's are those of equal time
        }
        for kind, amount in cells.items():
            if amount:
                name, each = part_name(budget, kind), budget * seconds + CELL_SECONDS
                yield Part(data, name, amount, each, RANKS[kind][place])


def fit_into(every: Sequence[Part], hours: float, cores: int) -> tuple[list[Part], list[Part]]:
    """Return the parts of a plan that are run within hours of so many cores, and those that are dropped for it.

    Equal steps at the largest budgets go first, then those at the middle one, the largest budgets, equal steps at the
    smallest one, the middle one's own learning rates, the middle one, and the search of options, without which all have
    their defaults; of equals the last data set's. Seeds are never dropped.

    Raises:
        UserError: what may not be dropped is too much.
    """
    kept, dropped = list(every), []
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
