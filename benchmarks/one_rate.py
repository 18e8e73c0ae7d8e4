"""Quality at one learning rate, which is no fair comparison: what the tables of docs/evidence.md were made by.

    python -m benchmarks.one_rate --data digits --seconds 30 --jobs 2 --out benchmarks/results/quality_digits.json

`benchmarks.quality` gives every model its own. Cells are (data set × model × seed × budget). Every cell is a run of
`train.py` on one thread, then samples with guidance and seed fixed beforehand, then `fid`. A budget is a number of
optimiser steps, or of seconds: those are turned into steps by timing all variants in turn, once, before the first cell,
so that a busy neighbour hits every model alike and each learning rate schedule ends
with its budget. Cells of one seed share data order, noise, times and labels: the comparison is paired. A cell that is
done is not run again, whatever study asks for it, and says which commit trained it; one that was interrupted resumes
from its last checkpoint; one that was trained or scored with other settings than today's is refused.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.output import publish
from benchmarks.scoring import DATA_SETS, METRICS, refuse_other_scores
from benchmarks.study import call, interval, paired_ratio, train
from gspn_dit.errors import ArgumentParser, UserError, run_cli

LEARNING_RATE, EMA_DECAY = 4e-3, 0.99
"""One rate for all variants, too low for attention: no fair comparison (docs/evidence.md, Correction)."""
_SCANS = {"model.name": "DiT-{size}/{patch}", "model.mixer": "gspn", "model.positions": True, "model.weight_groups": 4}
_BLOCKS = {"model.name": "GSPN-{size}/{patch}"}
VARIANTS: dict[str, dict[str, Any]] = {
    # The same model but for its mixer.
    "gspn": _SCANS,
    "attention": {"model.name": "DiT-{size}/{patch}", "model.mixer": "attention"},
    # What decides the options of scans.
    "no-positions": {**_SCANS, "model.positions": False},
    "own-weights": {key: value for key, value in _SCANS.items() if key != "model.weight_groups"},
    "window-2": {**_SCANS, "model.scan_window": 2},
    "two-directions": {**_SCANS, "model.scan_directions": ["right", "down"]},
    # The published block instead of DiT's, and what decides its options.
    "gspn-block": _BLOCKS,
    "gspn-block-adaln-zero": {**_BLOCKS, "model.conditioning": "adaln-zero"},
    "gspn-block-no-long-skips": {**_BLOCKS, "model.long_skips": False},
}


@dataclass(frozen=True)
class Cell:
    """One training: everything about it that differs between cells."""

    data: str
    variant: str
    size: str
    seed: int
    steps: int

    def directory(self, work: Path) -> Path:
        return work / self.data / f"{self.variant}-{self.size}" / f"{self.steps}-steps" / f"seed-{self.seed}"


def train_arguments(data: str, variant: str, size: str, seed: int, steps: int) -> list[str]:
    """Return the command line of `train.py` for a cell, but for its directory."""
    source = DATA_SETS[data]
    values: dict[str, Any] = {
        "seed": seed,
        "training.max_steps": steps,
        "training.learning_rate": LEARNING_RATE,
        "training.ema_decay": EMA_DECAY,
        "training.warmup_steps": min(100, steps // 10),
        "training.checkpoint_every": max(steps // 4, 1),
        "training.validate_every": steps,
        "training.sample_every": steps,
        "training.trackers": "[]",
        **{key: str(value).format(size=size, patch=source.patch) for key, value in VARIANTS[variant].items()},
    }
    return [*source.arguments(), *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Train and score a cell in processes of their own, unless its result is there already."""
    directory = cell.directory(work)
    result = directory / "result.json"
    refuse_other_scores(result, DATA_SETS[cell.data].setting)
    words = train_arguments(cell.data, cell.variant, cell.size, cell.seed, cell.steps)
    trained = train(words, directory / "run")
    if not result.exists():
        call(
            ["-m", "benchmarks.scoring", str(directory.absolute()), *DATA_SETS[cell.data].scoring_arguments()],
            directory / "log.txt",
        )
        print(f"{directory}: {json.loads(result.read_text(encoding='utf-8'))}", flush=True)
    figures = json.loads(result.read_text(encoding="utf-8"))
    del figures["setting"]
    return {**figures, "variant": cell.variant, "seed": cell.seed, "steps": cell.steps, "commit": trained["commit"]}


def summary(rows: list[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """Return each variant's means with intervals, and its paired ratios to the baseline."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    means = {
        variant: {metric: interval([row[metric] for row in rows if row["variant"] == variant]) for metric in METRICS}
        for variant in variants
    }
    ratios = {
        variant: {metric: paired_ratio(rows, metric, variant, baseline) for metric in ("fd", "val_loss")}
        for variant in variants
        if variant != baseline and baseline in variants
    }
    return {"means": means, f"paired_ratio_to_{baseline}": ratios}


def budgets_of(options: Any, milliseconds: dict[str, float]) -> dict[str, dict[str, int]]:
    """Return the steps of every variant under each budget.

    Seconds come in two ways, of which the first variant's cells are the same: all variants for as long, and all for as
    many steps as that one takes in the time.
    """
    budgets, equal = {}, [options.steps] if options.steps else []
    if options.seconds:
        steps = {name: max(int(1e3 * options.seconds / milliseconds[name]), 1) for name in options.variants}
        budgets[f"{options.seconds} s"] = steps
        equal.append(steps[options.variants[0]])
    return budgets | {f"{count} steps": dict.fromkeys(options.variants, count) for count in equal}


def study(options: Any) -> dict[str, Any]:
    """Run every cell that is not there yet, seed by seed, and return figures and intervals."""
    from benchmarks import calibration
    from benchmarks.measure import CpuDevice, software

    work = Path(options.work)
    words = {variant: train_arguments(options.data, variant, options.size, 0, 100) for variant in options.variants}
    file = work / options.data / f"calibration-{options.size}.json"
    times = calibration.calibrated(file, words, sides=DATA_SETS[options.data].buckets) if options.seconds else {}
    budgets = budgets_of(options, times)
    cells = [
        (budget, Cell(options.data, variant, options.size, seed, steps[variant]))
        for seed in range(options.seeds)
        for budget, steps in budgets.items()
        for variant in options.variants
    ]
    once = list(dict.fromkeys(cell for _, cell in cells))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(once, pool.map(lambda cell: run_cell(cell, work), once), strict=True))
    rows = [{**results[cell], "budget": budget} for budget, cell in cells]
    return {
        "data": options.data,
        "size": options.size,
        "setting": DATA_SETS[options.data].setting | {"jobs": options.jobs},
        "milliseconds_per_step": times,
        "cells": rows,
        "budgets": {
            budget: summary([row for row in rows if row["budget"] == budget], options.baseline) for budget in budgets
        },
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def main() -> None:
    """Run a study."""
    parser = ArgumentParser(prog="benchmarks.one_rate", description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=tuple(DATA_SETS), default="digits")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["gspn", "attention"])
    parser.add_argument("--baseline", choices=tuple(VARIANTS), default="attention", help="what the ratios divide by")
    parser.add_argument("--size", default="N", help="preset size of all models")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds, from 0 on")
    parser.add_argument("--steps", type=int, help="equal steps: this many")
    parser.add_argument(
        "--seconds", type=int, help="equal time: this much on one idle core, and the first variant's steps for all"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--work", default="runs/quality", help="where the cells live")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    if not (options.steps or options.seconds):
        raise UserError("no budget; give --steps N, --seconds N, or both")
    publish(study(options), options.out)


if __name__ == "__main__":
    run_cli(main)
