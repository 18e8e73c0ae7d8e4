"""What a training step takes, so that studies can turn an equal time into numbers of steps beforehand."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

ROUNDS = 42
"""Timed steps of each variant, in turn; the first two are warm-up."""


def milliseconds_per_step(
    arguments: Mapping[str, Sequence[str]],
    folder: Path,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time a training step of every variant in turn, on one thread; the median of the rounds of each.

    Args:
        arguments: of `train.py`, by variant.
        folder: where the runs may write.
        rounds: steps of each, at least 3.
        clock: seconds; `time.process_time` leaves out what other programs take.
    """
    from gspn_dit.config import parse_train_arguments
    from gspn_dit.tasks import create_task
    from gspn_dit.training import loop
    from gspn_dit.training.run_directory import RunDirectory

    torch.set_num_threads(1)
    trainers = {}
    for variant, words in arguments.items():
        place = folder / variant
        place.mkdir(parents=True, exist_ok=True)
        config = parse_train_arguments([*words, "--output_dir", str(place)]).config
        accelerator = loop.create_accelerator(config)
        trainers[variant] = loop.Trainer(config, create_task(config), accelerator, RunDirectory(place, None))
    taken: dict[str, list[float]] = {variant: [] for variant in trainers}
    for _ in range(rounds):
        for variant, trainer in trainers.items():
            began = clock()
            trainer.train_step()
            taken[variant].append(1e3 * (clock() - began))
    return {variant: statistics.median(times[2:]) for variant, times in taken.items()}


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
    square images of several `sides` in pixels, equally many of each, a time is the mean over steps with each of them.
    """
    alone = {
        variant: {
            f"{variant}, {side}×{side}": [*words, "--data.buckets", "[]", "--data.image_size", f"{side}"]
            for side in sides
        }
        or {variant: words}
        for variant, words in arguments.items()
    }
    known = _with_missing(
        file, {name: words for lines in alone.values() for name, words in lines.items()}, rounds, clock
    )
    return {variant: statistics.fmean(known[name] for name in lines) for variant, lines in alone.items()}


def _with_missing(
    file: Path, arguments: Mapping[str, Sequence[str]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return what the file has, after what it lacks has been timed and added."""
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if missing := {variant: words for variant, words in arguments.items() if variant not in known}:
        first = next((variant for variant in arguments if variant in known), None)
        timed = missing if first is None else {first: arguments[first], **missing}
        found = milliseconds_per_step(timed, file.with_suffix(""), rounds, clock)
        unit = 1.0 if first is None else known[first] / found[first]
        known |= {variant: unit * found[variant] for variant in missing}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=2), encoding="utf-8")
    return known
