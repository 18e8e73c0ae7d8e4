"""Recipes beside a baseline at equal time: Muon against AdamW, predicted data against velocity, shifted times.

    python -m benchmarks.recipes --seconds 18 --out benchmarks/results/recipes.json
    python -m benchmarks.recipes --data emoji --root data/emoji_classes --features runs/emoji_judge \
        --seconds 45 --out benchmarks/results/recipes_emoji.json

All train the same scans in DiT's block, on the bundled digits or on emoji in colour (`make demo-colour`; the features
are those of a run of task classification), on one thread, and differ in one option from the baseline. Time is the
processor's of a training step, measured in turn and turned into steps beforehand, so that each learning rate schedule
ends with its budget. Every recipe has its own best learning rate: three, and more at the better end until the best lies
inside, are tried with another seed. Cells of one seed share data order, noise and labels, and are judged by the Fréchet
distance of their samples: validation losses of other predictions or times do not compare. What is done is not done
again, and what was interrupted resumes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import calibration, scoring
from benchmarks.output import publish
from benchmarks.scoring import DATA_SETS, DataSet, add_data_options, chosen
from benchmarks.study import best_rate, interval, once, paired_ratio, train
from gspn_dit.errors import ArgumentParser, UserError, run_cli

BASELINE = "adamw"
RECIPES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "muon": {"training.optimizer": "muon"},
    "predicted data": {"objective.prediction": "data"},
    "shift 2": {"objective.timestep_shift": 2.0},
}
"""What differs from the baseline: AdamW, predicted velocities, times as they are drawn."""
MODELS: dict[str, dict[str, Any]] = {
    "digits": {"config": "demo", "model.name": "DiT-N/2", "model.mixer": "gspn", "model.lpu": True},
    "emoji": {
        **{"config": "demo_colour", "model.name": "DiT-N/4", "model.hidden_size": 64, "model.positions": False},
        **{
            "model.weight_groups": 4,
            "model.mixer_options.scan_norm": "layer",
            "model.mixer_options.channel_skip": True,
        },
    },
}
"""By data set, the config that all recipes share, and what they change in it."""
EMOJI_SETTING: dict[str, Any] = {"samples": 540, "steps": 20, "guidance_scale": 2.0, "sampling_seed": "the cell's"}
"""How every cell of emoji is scored."""
REFERENCE = 2_000
"""Real emoji to compare with."""
RATES = (4e-3, 8e-3, 1.6e-2)
MOST_RATES = 6
SEARCH_SEED = 100
"""Whose cells decide on rates, and on nothing else."""
METRICS = ("fd", "class_agreement", "recall")
"""Of a cell's images; emoji have no judge of classes beside their features."""


def train_arguments(recipe: str, seed: int, rate: float, steps: int, data: DataSet) -> list[str]:
    """Return the command line of `train.py` for a cell, but for the run's directory."""
    shared = dict(MODELS[data.name])
    config = shared.pop("config")
    values: dict[str, Any] = {
        **shared,
        **({"data.path": data.images[1]} if data.images[1] else {}),
        **RECIPES[recipe],
        "seed": seed,
        "training.max_steps": steps,
        "training.learning_rate": rate,
        "training.ema_decay": 0.99,
        "training.warmup_steps": max(1, steps // 10),
        "training.checkpoint_every": steps,
        "training.validate_every": steps,
        "training.sample_every": steps,
        "training.trackers": "[]",
        "sampling.steps": 1,
    }
    return [
        "--config",
        f"configs/{config}.yaml",
        *(word for key, value in values.items() for word in (f"--{key}", str(value))),
    ]


def next_rate(found: Mapping[float, float]) -> float | None:
    """Return the learning rate to try next, given the distances of those tried; None once the best lies inside.

    Raises UserError if it still lies at an end after `MOST_RATES`.
    """
    if missing := [rate for rate in RATES if rate not in found]:
        return missing[0]
    chosen = best_rate(found)
    if not chosen["at_an_end"]:
        return None
    if len(found) >= MOST_RATES:
        raise UserError(f"the best of {len(found)} learning rates is still at an end: {sorted(found)}; widen RATES")
    best = float(chosen["best"])
    return best * 2 if best == max(found) else best / 2


def run_cell(recipe: str, seed: int, rate: float, steps: int, work: Path, data: DataSet) -> dict[str, Any]:
    """Train and score a cell, unless it is there, and return its figures."""
    cell = work / recipe.replace(" ", "-") / f"{steps}-steps" / f"rate-{rate:g}" / f"seed-{seed}"
    trained = train(train_arguments(recipe, seed, rate, steps, data), cell / "run")
    if data.name == "digits":
        figures = score_digits(cell, data)
    else:
        figures = once(cell / "scores.json", lambda: score_emoji(cell / "run", seed, data))
    print(f"{cell}: FD {figures['fd']:.3f}", flush=True)
    facts = {"commit": trained["commit"], "val_loss": trained["val_loss"]}
    return {"variant": recipe, "seed": seed, "rate": rate, "steps": steps, **facts, **figures}


def score_digits(cell: Path, data: DataSet) -> dict[str, float]:
    """Return the scores of a cell of digits; its images are drawn with the cell's own seed."""
    if not (cell / "result.json").exists():
        scoring.score_cell(cell, data)
    scoring.refuse_other_scores(cell / "result.json", data.setting)
    figures = json.loads((cell / "result.json").read_text(encoding="utf-8"))
    return {name: figures[name] for name in METRICS}


def score_emoji(run: Path, seed: int, data: DataSet) -> dict[str, float]:
    """Return the scores of a run's images of all classes in turn."""
    samples, steps, guidance = (EMOJI_SETTING[name] for name in ("samples", "steps", "guidance_scale"))
    figures = data.scores(*scoring.draw(scoring.load(run), samples, steps, guidance, seed), REFERENCE)
    return {name: figures[name] for name in METRICS if name in figures}


def search(recipe: str, steps: int, work: Path, data: DataSet) -> dict[str, Any]:
    """Return the distances of the learning rates that were tried, and the best."""
    found: dict[float, float] = {}
    while (rate := next_rate(found)) is not None:
        found[rate] = run_cell(recipe, SEARCH_SEED, rate, steps, work, data)["fd"]
    return best_rate(found)


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each recipe's means with intervals, and its distances over the baseline's, seed by seed."""
    recipes = list(dict.fromkeys(cell["variant"] for cell in cells))
    metrics = [name for name in METRICS if name in cells[0]]
    means = {
        recipe: {name: interval([cell[name] for cell in cells if cell["variant"] == recipe]) for name in metrics}
        for recipe in recipes
    }
    ratios = {recipe: paired_ratio(cells, "fd", recipe, BASELINE) for recipe in recipes if recipe != BASELINE}
    return {"means": means, "fd_over_baseline": ratios}


def study(seconds: int, seeds: int, work: Path, data: DataSet = DATA_SETS["digits"]) -> dict[str, Any]:
    """Run every cell that is not there yet, and return figures and intervals."""
    from benchmarks.measure import CpuDevice, software

    words = {recipe: train_arguments(recipe, 0, RATES[0], 100, data) for recipe in RECIPES}
    milliseconds = calibration.calibrated(work / "calibration.json", words, clock=time.process_time, sides=data.buckets)
    steps = {recipe: max(1, int(1e3 * seconds / milliseconds[recipe])) for recipe in RECIPES}
    rates = {recipe: search(recipe, steps[recipe], work, data) for recipe in RECIPES}
    cells = [
        run_cell(recipe, seed, rates[recipe]["best"], steps[recipe], work, data)
        for seed in range(seeds)
        for recipe in RECIPES
    ]
    load = once(work / "load.json", lambda: list(os.getloadavg()))
    return {
        "data": data.name,
        "model": MODELS[data.name],
        "seconds": seconds,
        "setting": data.setting if data.name == "digits" else EMOJI_SETTING,
        "milliseconds_per_step": milliseconds,
        "rates": rates,
        "cells": cells,
        **summary(cells),
        "machine": {**CpuDevice().describe(), "load": load},
        "software": software(),
    }


def main() -> None:
    """Run the study."""
    parser = ArgumentParser(prog="benchmarks.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=18, help="processor time of each training")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds, from 0 on")
    add_data_options(parser, tuple(MODELS))
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="where the cells live")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    publish(study(options.seconds, options.seeds, options.work, *chosen(options)), options.out)


if __name__ == "__main__":
    run_cli(main)
