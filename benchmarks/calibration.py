"""What a training step takes, so that studies can turn an equal time into numbers of steps beforehand."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROUNDS = 40
"""Timed steps of each variant."""
TURNS = 2
"""Processes of each variant, among which the steps are divided."""
WARM_UP = 2
"""Steps of a process that are not timed: in them it gets its memory."""
STEPS_OF_SEVERAL_SIZES = 4
"""As many as of one size, so that each has its share."""


def milliseconds_per_step(
    arguments: Mapping[str, Sequence[str]],
    folder: Path,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    average: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """Time a training step of every variant on one thread.

    Each variant steps in a process of its own, as it trains: in one that trains others, too, memory is in pieces, has
    to be mapped anew at every step, and makes steps up to a third longer, not alike for all. Variants take turns.

    Args:
        arguments: of `train.py`, by variant.
        folder: where the runs may write.
        rounds: timed steps of each.
        clock: seconds; `time.process_time` leaves out what other programs take. A function that can be pickled.
        average: of the steps of each.

    Raises:
        UserError: the arguments are refused.
    """
    taken: dict[str, list[float]] = {variant: [] for variant in arguments}
    for _ in range(TURNS):
        for variant, words in arguments.items():
            taken[variant] += _in_new_process(words, folder / variant, max(rounds // TURNS, 1), clock)
    return {variant: average(times) for variant, times in taken.items()}


def _in_new_process(words: Sequence[str], place: Path, rounds: int, clock: Callable[[], float]) -> list[float]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gspn_dit.training.loop"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_milliseconds, list(words), place, rounds, clock).result()


def _milliseconds(words: Sequence[str], place: Path, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Return how long each step of a training takes, but for the first ones, which warm up."""
    from gspn_dit.config import parse_train_arguments
    from gspn_dit.tasks import create_task
    from gspn_dit.training import loop
    from gspn_dit.training.run_directory import RunDirectory

    torch.set_num_threads(1)
    place.mkdir(parents=True, exist_ok=True)
    config = parse_train_arguments([*words, "--output_dir", str(place)]).config
    trainer = loop.Trainer(config, create_task(config), loop.create_accelerator(config), RunDirectory(place, None))
    taken = []
    for _ in range(WARM_UP + rounds):
        began = clock()
        trainer.train_step()
        taken.append(1e3 * (clock() - began))
    return taken[WARM_UP:]


def calibrated(
    file: Path,
    arguments: Mapping[str, Sequence[str]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    sides: Sequence[int] = (),
) -> dict[str, float]:
    """Return milliseconds per step, kept in a JSON file so that resumed studies keep their budgets.

    Only variants that the file lacks are timed, in turn with the first that it has: their times are in the unit of that
    one's, whatever the machine does beside. The runs that it takes are written beside the file. Where the data has
    square images of several `sides` in pixels, in an order that is the seed's and the same for all, a time is the mean
    over `STEPS_OF_SEVERAL_SIZES` times as many steps: a median would be that of one size.
    """
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if missing := {variant: words for variant, words in arguments.items() if variant not in known}:
        first = next((variant for variant in arguments if variant in known), None)
        timed = missing if first is None else {first: arguments[first], **missing}
        steps, average = (STEPS_OF_SEVERAL_SIZES * rounds, statistics.fmean) if sides else (rounds, statistics.median)
        found = milliseconds_per_step(timed, file.with_suffix(""), steps, clock, average)
        unit = 1.0 if first is None else known[first] / found[first]
        known |= {variant: unit * found[variant] for variant in missing}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=2), encoding="utf-8")
    return {variant: known[variant] for variant in arguments}
