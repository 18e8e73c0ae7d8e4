"""GSPN beside peers of equal parameters at equal time: small classifiers, trained and scored in one way.

    python -m benchmarks.classification --data fashion --root runs/fashion/data \\
        --out benchmarks/results/classification_fashion.json

A cell is a run of `train.py` on one thread. All models have one recipe but for the learning rate: each gets the best of
four, found in short runs with another seed on images that are held out of the training split, so that no choice has
seen the images it is judged by. Time becomes steps by the processor's time of each model's training step, timed in
turn, which neighbours on the machine change little; a learning rate's schedule ends with the budget. Cells of one seed
share order and augmentation of the images: differences are paired. What is done is kept, what was interrupted resumes.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks import calibration
from benchmarks.markdown import mean_and_interval, plural, provenance, table
from benchmarks.output import publish
from benchmarks.study import best_rate, interval, once, train
from gspn_dit.errors import ArgumentParser, UserError, run_cli

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEARCH_SEED = 100
CALIBRATION_ROUNDS = 12
BASELINE = "gspn"
SCORES = ("val_top1", "val_top5", "val_loss")
MODELS: dict[str, dict[str, Any]] = {
    "gspn": {"name": "gspn_nano", "options": {}},
    "convnext": {
        "name": "timm/convnext_atto",
        "options": {"depths": [2, 2, 2, 1], "dims": [40, 80, 112, 128], "patch_size": 2},
    },
    "vit": {
        "name": "timm/vit_tiny_patch16_224",
        "options": {"img_size": 32, "patch_size": 4, "embed_dim": 112, "depth": 4, "num_heads": 4},
    },
    "resnet": {"name": "timm/resnet10t", "options": {"channels": [32, 64, 112, 144], "stem_width": 16}},
}
"""About 0.6 million parameters each; timm's models are cut to that by their own options."""
RECIPE: dict[str, Any] = {
    "task": "classification",
    "model.drop_path_rate": 0.0,  # timm's stochastic depth could not be resumed exactly
    "data.horizontal_flip": True,
    "classification.crop_padding": 2,
    "classification.erasing_probability": 0.1,
    "classification.label_smoothing": 0.1,
    "training.batch_size": 64,
    "training.learning_rate_schedule": "cosine",
    "training.final_learning_rate": 1e-5,
    "training.weight_decay": 0.05,
    "training.decay_vectors": False,
    "training.ema_decay": 0.99,
    "training.validation_images": 10_000,
    "training.trackers": [],
}
DATA_SETS: dict[str, dict[str, str]] = {
    "fashion": {"source": "hf", "training_split": "{root}-training"},
    "emoji": {"source": "imagefolder", "training_split": "{root}/train"},
}
"""Of each data set of 32×32 pixels, how it is read, and where its training split alone is: a tenth of that is held out
by a search."""


def arguments(data: str, root: str, model: str, rate: float, seed: int, steps: int, search: bool = False) -> list[str]:
    """Return the command line of `train.py` for a cell, but for its directory."""
    facts, net = DATA_SETS[data], MODELS[model]
    values: dict[str, Any] = {
        **RECIPE,
        "data.name": facts["source"],
        "data.path": facts["training_split"].format(root=root) if search else root,
        "seed": seed,
        "model.name": net["name"],
        "model.backbone_options": net["options"],
        "training.learning_rate": rate,
        "training.warmup_steps": max(1, steps // 10),
        "training.max_steps": steps,
        "training.log_every": max(1, steps // 10),
        **{f"training.{name}_every": steps for name in ("validate", "sample", "checkpoint")},
    }
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def prepare_search(data: str, root: str) -> None:
    """Save Fashion-MNIST's training split alone."""
    place = Path(DATA_SETS[data]["training_split"].format(root=root))
    if not place.exists():
        import datasets

        datasets.load_from_disk(root)["train"].save_to_disk(str(place))


def cell(options: Any, model: str, rate: float, seed: int, steps: int, search: bool = False) -> dict[str, Any]:
    """Train a cell, unless that is done, and return its figures."""
    run = Path(options.work) / options.data / model / f"{'search' if search else 'judge'}-{rate:g}-{seed}-{steps}"
    found = train(arguments(options.data, options.root, model, rate, seed, steps, search), run)
    print(f"{run}: top-1 {100 * found['val_top1']:.2f}%", flush=True)
    own = {"model": model, "rate": rate, "seed": seed, "steps": steps}
    return {**own, **{score: found[score] for score in SCORES}, "commit": found["commit"]}


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each model's means with 95% intervals (Student's t over seeds), and paired differences to the baseline."""

    def values(model: str, score: str) -> dict[int, float]:
        return {cell["seed"]: cell[score] for cell in cells if cell["model"] == model}

    base = values(BASELINE, "val_top1")
    return {
        model: {
            **{score: interval(list(values(model, score).values())) for score in SCORES},
            "top1_minus_gspn": interval([top - base[seed] for seed, top in values(model, "val_top1").items()]),
        }
        for model in dict.fromkeys(cell["model"] for cell in cells)
    }


def classification_table(result: dict[str, Any]) -> str:
    """Tabulate the study: what each model costs, its rate, and its scores."""
    rows = []
    for model, found in result["summary"].items():
        facts, own = result["models"][model], [cell for cell in result["cells"] if cell["model"] == model]
        rate = result["rates"][model]
        rows.append(
            [
                facts["name"],
                f"{facts['parameters']:,}",
                f"{facts['multiply_adds'] / 1e6:.1f}M",
                f"{result['cpu_milliseconds_per_step'][model]:.0f} ms",
                f"{own[0]['steps']:,}",
                f"{rate['best']:g}{' (at an end)' if rate['at_an_end'] else ''}",
                mean_and_interval({key: 100 * value for key, value in found["val_top1"].items()}),
                "" if model == BASELINE else points(found["top1_minus_gspn"]),
                mean_and_interval(found["val_loss"]),
            ]
        )
    heads = ["model", "parameters", "multiply-adds", "a step", "steps", "rate", "top-1, %", "minus GSPN, points"]
    commits = ", ".join(sorted({cell["commit"] for cell in result["cells"]}))
    seeds = len({cell["seed"] for cell in result["cells"]})
    return (
        table([*heads, "cross-entropy"], rows)
        + f"\n{result['seconds']:g} seconds of one thread for each model, {plural(seeds, 'paired seed')}, rates "
        + f"searched in {result['search_seconds']:g} seconds each. Trained at {commits}. {provenance(result)}\n"
    )


def points(found: dict[str, float]) -> str:
    """Write a difference of shares and its 95% interval in points, with signs.

    >>> points({"mean": -0.012, "low": -0.02, "high": 0.003})
    '-1.20 [-2.00, +0.30]'
    """
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f}" if math.isnan(low) else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def model_facts(data: str, root: str) -> dict[str, Any]:
    """Return parameters and multiply-adds of each model as it is trained."""
    from gspn_dit.config import parse_train_arguments
    from gspn_dit.tasks import create_task

    found = {}
    for model in MODELS:
        task = create_task(parse_train_arguments(arguments(data, root, model, 1e-3, 0, 10)).config)
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        found[model] = {"name": MODELS[model]["name"], "parameters": parameters, "multiply_adds": task.multiply_adds()}
    return found


def study(options: Any) -> dict[str, Any]:
    """Search the learning rates, train every cell that is not there yet, and return figures and intervals."""
    from benchmarks.measure import CpuDevice, software

    data, root, work = options.data, options.root, Path(options.work) / options.data
    prepare_search(data, root)
    before = once(work / "machine.json", CpuDevice().describe)
    variants = {model: arguments(data, root, model, 1e-3, 0, 100) for model in MODELS}
    costs = calibration.calibrated(work / "calibration.json", variants, CALIBRATION_ROUNDS, time.process_time)
    search_steps, steps = (
        {model: max(10, int(1e3 * seconds / cost)) for model, cost in costs.items()}
        for seconds in (options.search_seconds, options.seconds)
    )
    searched = {
        model: [cell(options, model, rate, SEARCH_SEED, search_steps[model], search=True) for rate in RATES]
        for model in MODELS
    }
    rates = {model: best_rate({row["rate"]: 1 - row["val_top1"] for row in rows}) for model, rows in searched.items()}
    cells = [
        cell(options, model, rates[model]["best"], seed, steps[model])
        for seed in range(options.seeds)
        for model in MODELS
    ]
    return {
        "data": data,
        "seconds": options.seconds,
        "search_seconds": options.search_seconds,
        "recipe": RECIPE,
        "models": model_facts(data, root),
        "cpu_milliseconds_per_step": costs,
        "search": searched,
        "rates": {model: {"best": rate["best"], "at_an_end": rate["at_an_end"]} for model, rate in rates.items()},
        "cells": cells,
        "summary": summary(cells),
        "machine": before,
        "machine_after": CpuDevice().describe(),
        "software": software(),
    }


def main() -> None:
    """Run the study."""
    parser = ArgumentParser(prog="benchmarks.classification", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=tuple(DATA_SETS), default="fashion")
    parser.add_argument("--root", help="of the data; default: runs/fashion/data, data/emoji32")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor's time of each final training")
    parser.add_argument("--search-seconds", type=float, default=12.0, help="and of each one that searches")
    parser.add_argument("--seeds", type=int, default=3, help="paired seeds, from 0 on")
    parser.add_argument("--work", default="runs/classification", help="where the cells live")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    options.root = str(Path(options.root or {"fashion": "runs/fashion/data", "emoji": "data/emoji32"}[options.data]))
    if not Path(options.root).exists():
        raise UserError(f"--root {options.root} is not there; gspn_dit.prepare.{options.data} makes it")
    publish(study(options), options.out)


if __name__ == "__main__":
    run_cli(main)
