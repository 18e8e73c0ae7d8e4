"""GSPN beside peers of equal parameters at equal time: small classifiers, trained and scored in one way.

    python -m benchmarks.classification --data fashion --seconds 90 --search-seconds 20 \\
        --out benchmarks/results/classification_fashion.json

A cell is a run of `train.py` on one thread. All models have the same recipe but for the learning rate: each gets the
best of four, found in short runs with another seed on images that are held out of the training split, so that no choice
has seen the images it is judged by. Time becomes steps by the processor's time of each model's training step, measured
in turn, which neighbours on the machine change little; a learning rate's schedule then ends with the budget. Cells of
one seed share order and augmentation of the images: differences are paired. What is done is not done again, and what
was interrupted resumes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import calibration
from benchmarks.study import interval, train
from gspn_dit.errors import ArgumentParser, UserError, run_cli

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEARCH_SEED = 100
CALIBRATION_STEPS = 12
"""Timed steps of each model, in turn."""
BASELINE = "gspn"
MODELS: dict[str, dict[str, Any]] = {
    "gspn": {"name": "gspn_nano", "options": {"widths": [32, 64, 128], "depths": [1, 2, 2], "expansion": 1.0}},
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
    "classification.label_smoothing": 0.1,
    "training.batch_size": 64,
    "training.learning_rate_schedule": "cosine",
    "training.weight_decay": 0.05,
    "training.decay_vectors": False,
    "training.ema_decay": 0.99,
    "training.validation_images": 10_000,
    "training.trackers": [],
}
DATA_SETS: dict[str, dict[str, dict[str, Any]]] = {
    # How a model is judged, and how its learning rate is searched.
    "fashion": {
        "judge": {"data.name": "hf", "data.path": "{root}"},
        "search": {"data.name": "hf", "data.path": "{root}-training"},
    },
    "emoji": {
        "judge": {"data.name": "imagefolder", "data.path": "{root}"},
        "search": {"data.name": "imagefolder", "data.path": "{root}/train"},
    },
}


@dataclass(frozen=True)
class Cell:
    """One training: everything about it that differs between cells."""

    data: str
    model: str
    rate: float
    seed: int
    steps: int
    part: str
    """"judge" or "search"."""

    def directory(self, work: Path) -> Path:
        name = f"{self.part}-rate-{self.rate:g}-seed-{self.seed}-{self.steps}-steps"
        return work / self.data / self.model / name


def arguments(cell: Cell, root: str) -> list[str]:
    """Return the command line of `train.py` for a cell, but for its directory."""
    model = MODELS[cell.model]
    values: dict[str, Any] = {
        **RECIPE,
        **DATA_SETS[cell.data][cell.part],
        "seed": cell.seed,
        "model.name": model["name"],
        "model.backbone_options": model["options"],
        "training.learning_rate": cell.rate,
        "training.warmup_steps": max(1, cell.steps // 10),
        "training.max_steps": cell.steps,
        **{f"training.{name}_every": cell.steps for name in ("validate", "sample", "checkpoint")},
    }
    values["data.path"] = values["data.path"].format(root=root)
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def prepare_search(data: str, root: str) -> None:
    """Save Fashion-MNIST's training split alone, of which a tenth is then held out."""
    if data != "fashion" or Path(f"{root}-training").exists():
        return
    import datasets

    datasets.load_from_disk(root)["train"].save_to_disk(f"{root}-training")


def cpu_seconds_per_step(data: str, root: str, work: Path) -> dict[str, float]:
    """Return the processor's time of a training step of every model on one thread, measured once for a directory."""
    words = {model: arguments(Cell(data, model, 1e-3, 0, 100, "judge"), root) for model in MODELS}
    file = work / data / "calibration.json"
    taken = calibration.calibrated(file, words, CALIBRATION_STEPS, time.process_time)
    return {model: milliseconds / 1e3 for model, milliseconds in taken.items()}


def run_cell(cell: Cell, root: str, work: Path) -> dict[str, Any]:
    """Train a cell in a process of its own, unless that is done, and return its figures."""
    run = cell.directory(work)
    found = train(arguments(cell, root), run)
    print(f"{run}: top-1 {100 * found['val_top1']:.2f}%", flush=True)
    return {
        **{key: getattr(cell, key) for key in ("model", "rate", "seed", "steps")},
        **{key: found[key] for key in ("val_top1", "val_top5", "val_loss", "commit")},
    }


def best_rate(cells: list[dict[str, Any]]) -> float:
    """Return the learning rate of the highest top-1; of the lower loss among equals."""
    return max(cells, key=lambda cell: (cell["val_top1"], -cell["val_loss"]))["rate"]


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each model's means with 95% intervals (Student's t over seeds), and paired differences to the baseline."""

    def values(model: str, key: str) -> dict[int, float]:
        return {cell["seed"]: cell[key] for cell in cells if cell["model"] == model}

    models = list(dict.fromkeys(cell["model"] for cell in cells))
    base = values(BASELINE, "val_top1")
    return {
        model: {
            **{key: interval(list(values(model, key).values())) for key in ("val_top1", "val_top5", "val_loss")},
            "top1_minus_gspn": interval([top - base[seed] for seed, top in values(model, "val_top1").items()]),
        }
        for model in models
    }


def facts(data: str, root: str) -> dict[str, Any]:
    """Return parameters and multiply-adds of each model."""
    from gspn_dit.data.images import load_splits
    from gspn_dit.models.classifiers import classifier_multiply_adds, create_classifier

    judged = DATA_SETS[data]["judge"]
    images, _ = load_splits(judged["data.name"], judged["data.path"].format(root=root), None, 0.1)
    found = {}
    for name, model in MODELS.items():
        built = create_classifier(model["name"], images.num_classes, images.channels, model["options"])
        found[name] = {
            **model,
            "parameters": sum(parameter.numel() for parameter in built.parameters()),
            "multiply_adds": classifier_multiply_adds(built, images.channels, images.image_size),
        }
    return found


def study(options: Any) -> dict[str, Any]:
    """Search the learning rates, run every cell that is not there yet, and return figures and intervals."""
    from benchmarks.measure import CpuDevice, software

    work, root, data = Path(options.work), options.root, options.data
    prepare_search(data, root)
    before, costs = CpuDevice().describe(), cpu_seconds_per_step(data, root, work)
    search_steps, steps = (
        {model: max(10, int(seconds / cost)) for model, cost in costs.items()}
        for seconds in (options.search_seconds, options.seconds)
    )
    searched = [
        run_cell(Cell(data, model, rate, SEARCH_SEED, search_steps[model], "search"), root, work)
        for model in MODELS
        for rate in RATES
    ]
    rates = {model: best_rate([cell for cell in searched if cell["model"] == model]) for model in MODELS}
    cells = [
        run_cell(Cell(data, model, rates[model], seed, steps[model], "judge"), root, work)
        for seed in range(options.seeds)
        for model in MODELS
    ]
    return {
        "data": data,
        "seconds": options.seconds,
        "search_seconds": options.search_seconds,
        "recipe": RECIPE,
        "models": facts(data, root),
        "cpu_seconds_per_step": costs,
        "rates": rates,
        "search": searched,
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
    parser.add_argument("--seconds", type=float, default=90.0, help="processor's time of each final training")
    parser.add_argument("--search-seconds", type=float, default=20.0, help="and of each one that searches")
    parser.add_argument("--seeds", type=int, default=3, help="paired seeds, from 0 on")
    parser.add_argument("--work", default="runs/classification", help="where the cells live")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    options.root = options.root or {"fashion": "runs/fashion/data", "emoji": "data/emoji32"}[options.data]
    if not Path(options.root).exists():
        raise UserError(f"--root {options.root} is not there; gspn_dit.prepare.{options.data} makes it")
    text = json.dumps(study(options), indent=2)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
