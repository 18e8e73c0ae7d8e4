"""Recipes beside a baseline at equal time: Muon against AdamW, predicted data against velocity, shifted times.

    python -m benchmarks.recipes --seconds 18 --out benchmarks/results/recipes.json
    python -m benchmarks.recipes --data emoji --root data/emoji_classes --features runs/emoji_classifier \
        --seconds 30 --out benchmarks/results/recipes_emoji.json

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import calibration, quality
from benchmarks.study import best_rate, call, interval, once, paired_ratio, train
from gspn_dit.errors import ArgumentParser, UserError, run_cli

BASELINE = "adamw"
RECIPES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "muon": {"training.optimizer": "muon"},
    "predicted data": {"objective.prediction": "data"},
    "shift 2": {"objective.timestep_shift": 2.0},
}
"""What differs from the baseline: AdamW, predicted velocities, times as they are drawn."""
DATA_SETS: dict[str, dict[str, Any]] = {
    "digits": {"config": "demo", "model.name": "DiT-N/2", "model.mixer": "gspn", "model.lpu": True},
    "emoji": {"config": "demo_colour"},
}
"""The config that all recipes share, and what they change in it."""
EMOJI_SAMPLES: dict[str, Any] = {"per_class": 20, "steps": 20, "guidance_scale": 2.0}
RATES = (4e-3, 8e-3, 1.6e-2)
MOST_RATES = 6
SEARCH_SEED = 100
"""Whose cells decide on rates, and on nothing else."""
METRICS = ("fd", "class_agreement", "recall")
"""Of a cell's images; emoji have no judge of classes beside their features."""


@dataclass(frozen=True)
class Place:
    """Where the data of a study, the net that scores them, and its cells are."""

    work: Path
    data: str = "digits"
    root: Path | None = None
    features: Path | None = None


def train_arguments(recipe: str, seed: int, rate: float, steps: int, place: Place) -> list[str]:
    """Return the command line of `train.py` for a cell, but for the run's directory."""
    shared = {key: value for key, value in DATA_SETS[place.data].items() if key != "config"}
    values: dict[str, Any] = {
        **shared,
        **({"data.path": place.root.absolute()} if place.root else {}),
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
        f"configs/{DATA_SETS[place.data]['config']}.yaml",
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


def run_cell(recipe: str, seed: int, rate: float, steps: int, place: Place) -> dict[str, Any]:
    """Train and score a cell, unless it is there, and return its figures."""
    cell = place.work / recipe.replace(" ", "-") / f"{steps}-steps" / f"rate-{rate:g}" / f"seed-{seed}"
    trained = train(train_arguments(recipe, seed, rate, steps, place), cell / "run")
    score = score_digits if place.data == "digits" else score_emoji
    figures = score(cell, seed, place)
    print(f"{cell}: FD {figures['fd']:.3f}", flush=True)
    facts = {"commit": trained["commit"], "val_loss": trained["val_loss"]}
    return {"variant": recipe, "seed": seed, "rate": rate, "steps": steps, **facts, **figures}


def score_digits(cell: Path, _seed: int, _place: Place) -> dict[str, float]:
    """Return the scores of a cell of digits; its images are drawn with the cell's own seed."""
    if not (cell / "result.json").exists():
        quality.score_cell(cell, "digits")
    quality.refuse_other_scores(cell / "result.json")
    figures = json.loads((cell / "result.json").read_text(encoding="utf-8"))
    return {name: figures[name] for name in METRICS}


def score_emoji(cell: Path, seed: int, place: Place) -> dict[str, float]:
    """Return the scores of a cell of emoji, by the commands that anyone draws and scores images with."""
    report, samples = cell / "report" / "report.json", str(cell / "samples.npz")
    if not report.exists():
        options = {**EMOJI_SAMPLES, "order": "interleaved", "seed": seed, "save_npz": samples}
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        call(["sample.py", "--checkpoint", str(cell / "run"), *words], cell / "score.log")
        nets = ["--reference", str(place.root), "--features", str(place.features)]
        call(["-m", "fid", "--samples", samples, *nets, "--out", str(report.parent), "--overwrite"], cell / "score.log")
    scores = json.loads(report.read_text(encoding="utf-8"))["scores"]
    return {"fd": next(value for name, value in scores.items() if name.startswith("FD-")), "recall": scores["recall"]}


def setting(place: Place) -> dict[str, Any]:
    """Return how many images of a cell are drawn and scored, and how."""
    if place.root is None:
        return quality.SETTING
    classes = sum(entry.is_dir() for entry in (place.root / "train").iterdir())
    return {"samples": classes * EMOJI_SAMPLES["per_class"], **EMOJI_SAMPLES}


def search(recipe: str, steps: int, place: Place) -> dict[str, Any]:
    """Return the distances of the learning rates that were tried, and the best."""
    found: dict[float, float] = {}
    while (rate := next_rate(found)) is not None:
        found[rate] = run_cell(recipe, SEARCH_SEED, rate, steps, place)["fd"]
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


def study(seconds: int, seeds: int, place: Place) -> dict[str, Any]:
    """Run every cell that is not there yet, and return figures and intervals."""
    from benchmarks.measure import CpuDevice, software

    words = {recipe: train_arguments(recipe, 0, RATES[0], 100, place) for recipe in RECIPES}
    milliseconds = calibration.calibrated(place.work / "calibration.json", words, clock=time.process_time)
    steps = {recipe: max(1, int(1e3 * seconds / milliseconds[recipe])) for recipe in RECIPES}
    rates = {recipe: search(recipe, steps[recipe], place) for recipe in RECIPES}
    cells = [
        run_cell(recipe, seed, rates[recipe]["best"], steps[recipe], place)
        for seed in range(seeds)
        for recipe in RECIPES
    ]
    load = once(place.work / "load.json", lambda: list(os.getloadavg()))
    return {
        "data": place.data,
        "model": DATA_SETS[place.data],
        "seconds": seconds,
        "setting": setting(place),
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
    parser.add_argument("--data", choices=DATA_SETS, default="digits")
    parser.add_argument("--root", type=Path, help="of the emoji: what prepare.emoji_classes wrote")
    parser.add_argument("--features", type=Path, help="of the emoji: a run of task classification")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="where the cells live")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    if options.data == "emoji" and not (options.root and options.features):
        raise UserError("--data emoji needs --root (the images) and --features (a run of task classification)")
    place = Place(options.work, options.data, options.root, options.features)
    text = json.dumps(study(options.seconds, options.seeds, place), indent=2)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
