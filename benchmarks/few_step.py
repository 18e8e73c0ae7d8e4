"""Images in one to four steps: flow maps and mean flows beside the velocity model that trained for as long.

    python -m benchmarks.few_step --seconds 40 --out benchmarks/results/few_step.json --picture docs/few_step.png
    python -m benchmarks.few_step --distilled runs/digits_one_step --out benchmarks/results/digits_one_step.json

Digits, or emoji in colour (`--data emoji`), on one thread; the command can be stopped and started again, and resumes
where it was. Every recipe trains for a multiple of `--seconds` of the processor's time: in all, a teacher's time
included. Seconds become steps by timing the objectives in turn, once. Runs of one seed share data order and noise.
Guidance is the same for all: a velocity model's when sampling, the others' when training. Drawing is timed by the
processor too, all ways in turn.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import calibration, scoring
from benchmarks.measure import CpuDevice, software
from benchmarks.output import publish
from benchmarks.scoring import DATA_SETS, DataSet, add_data_options, chosen, load
from benchmarks.study import interval, once, paired_ratio, train
from gspn_dit.errors import ArgumentParser, run_cli

if TYPE_CHECKING:
    from gspn_dit.pipeline import GSPNPipeline

SAMPLES, REFERENCE, BATCH = 1_000, 2_000, 100
"""Images that are scored, real ones to compare with, and images drawn at a time where drawing is timed."""
FIGURES = ("fd", "recall", "class_agreement", "judge_validation_accuracy")
"""What is kept of the scores; some data sets have no judge of classes."""
MANY = 50
"""Steps of the velocity model that the others are compared with."""
STEPS = (1, 2, 4, MANY)
GUIDANCE_SCALE = 1.5
DIGITS: dict[str, Any] = {
    "model.name": "GSPN-N/2",
    "model.drop_path_rate": 0.0,
    "data.name": "digits",
    "training.validation_images": 360,
}
EMOJI: dict[str, Any] = {
    **{"model.name": "DiT-N/4", "model.hidden_size": 96, "model.mixer": "gspn", "model.lpu": True},
    **{"model.positions": True, "data.name": "imagefolder", "data.image_size": 32},
    "training.validation_images": 256,
}
"""The model of `make demo-colour`."""
MODELS = {"digits": DIGITS, "emoji": EMOJI}
"""By data set."""
DATA = DATA_SETS["digits"]
"""Unless an option says otherwise."""
COMMON: dict[str, Any] = {
    "training.batch_size": 64,
    "training.learning_rate": 4e-3,
    "training.learning_rate_schedule": "cosine",
    "training.weight_decay": 0.01,
    "training.ema_decay": 0.99,
    "training.trackers": [],
    "sampling.per_class": 1,
    "sampling.steps": 1,
    "sampling.guidance_scale": 1.0,
}
FEW_STEP: dict[str, Any] = {
    "objective.guidance_scale": GUIDANCE_SCALE,
    "objective.pair_share": 0.5,
    "objective.pair_times": "uniform",
}
"""Found in short runs of seed 0; the published shares and times lead to worse images in one step."""
OWN: dict[str, dict[str, Any]] = {"velocity": {}, "flow_map": FEW_STEP, "mean_flow": FEW_STEP}
"""What the objectives do not share."""


@dataclass(frozen=True)
class Recipe:
    """A training: its objective, its share of the study's seconds, and the recipe whose weights it starts from."""

    objective: str
    share: float
    teacher: str | None = None


RECIPES = {
    "velocity": Recipe("velocity", 1),
    "velocity, half": Recipe("velocity", 1 / 2),
    **{f"{name}, from scratch": Recipe(name, 1) for name in ("flow_map", "mean_flow")},
    **{f"{name}, half + half": Recipe(name, 1 / 2, "velocity, half") for name in ("flow_map", "mean_flow")},
    **{f"{name}, twice as long": Recipe(name, 1, "velocity") for name in ("flow_map", "mean_flow")},
}
BASELINE, PACKAGED = "velocity", "builtin:digits"
TARGETS = {
    "FD in 1 step / FD in 50, equal training time": ("fd", 1, "<=", 2.0),
    "FD in 4 steps / FD in 50, equal training time": ("fd", 4, "<=", 1.3),
    "class agreement in 1 step": ("class_agreement", 1, ">=", 0.95),
    "images per second, 1 step / 50": ("images_per_second", 1, ">=", 30.0),
}
"""What is to be shown: figure, steps, sign, bound."""


def seconds_in_all(name: str) -> float:
    """Return the share of the study's seconds that a recipe takes with those that it starts from."""
    recipe = RECIPES[name]
    return recipe.share + (seconds_in_all(recipe.teacher) if recipe.teacher else 0)


def steps_of(recipe: Recipe, seconds: float, milliseconds: Mapping[str, float]) -> int:
    """Return how many steps a recipe's share of the seconds is."""
    return max(1, int(1e3 * seconds * recipe.share / milliseconds[recipe.objective]))


def arguments(recipe: Recipe, steps: int, seed: int, teacher: Path | None, data: DataSet = DATA) -> list[str]:
    """Return the command line of `train.py` for a run, but for its directory."""
    values = {
        **MODELS[data.name],
        **({"data.path": data.images[1]} if data.images[1] else {}),
        **COMMON,
        **OWN[recipe.objective],
        "objective.name": recipe.objective,
        "seed": seed,
        "training.max_steps": steps,
        "training.warmup_steps": min(100, steps // 10),
        "training.log_every": max(1, steps // 10),
        **{f"training.{kind}_every": steps for kind in ("validate", "sample")},
        "training.checkpoint_every": max(1, steps // 4),
        **({"training.initialize_from": teacher} if teacher else {}),
    }
    words = (word for key, value in values.items() for word in (f"--{key}", str(value)))
    return list(words)


def with_teachers(names: Sequence[str]) -> list[str]:
    """Return recipes and those that they start from, teachers first."""
    teachers = {RECIPES[name].teacher for name in names}
    return [name for name in RECIPES if name in names or name in teachers]


def directory(runs: Path, seed: int, name: str) -> Path:
    """Return where a recipe's run of a seed is kept."""
    return runs / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")


def train_all(
    names: Sequence[str], runs: Path, seed: int, counts: Mapping[str, int], data: DataSet = DATA
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Train recipes with a seed, teachers first, and return the runs with their last metrics."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name in with_teachers(names):
        run, recipe = directory(runs, seed, name), RECIPES[name]
        teacher = done[recipe.teacher][0] if recipe.teacher else None
        done[name] = run, train(arguments(recipe, counts[name], seed, teacher, data), run)
    return done


def steps_to_score(name: str) -> tuple[int, ...]:
    """Return the numbers of steps that a recipe's model is scored with: many for what needs them."""
    return STEPS if RECIPES[name].objective == "velocity" else STEPS[:-1]


def draw(pipeline: GSPNPipeline, steps: int, count: int, seed: int) -> np.ndarray:
    """Return images of all classes in turn, uint8 [count, H, W, C]."""
    return scoring.draw(pipeline, count, steps, GUIDANCE_SCALE, seed)[0]


def score_run(run: Path | str, steps: Sequence[int], seed: int, data: DataSet = DATA) -> dict[str, dict[str, float]]:
    """Return the scores of a run's images by number of steps."""
    found, pipeline = {}, load(run)
    for count in steps:
        scores = data.scores(*scoring.draw(pipeline, SAMPLES, count, GUIDANCE_SCALE, seed), REFERENCE)
        found[str(count)] = {name: scores[name] for name in FIGURES if name in scores}
    return found


def time_drawing(ways: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, dict[str, float]]:
    """Time ways to draw `BATCH` images in turn, by the processor's time; the first round is warm-up.

    Returns:
        By way, images per second of the median round, and the spread of the rounds over it.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, run in ways.items():
            began = time.process_time()
            run()
            seconds[way].append(time.process_time() - began)
    return {
        way: {
            "images_per_second": BATCH / statistics.median(taken[1:]),
            "spread": (max(taken[1:]) - min(taken[1:])) / statistics.median(taken[1:]),
        }
        for way, taken in seconds.items()
    }


def speeds(velocity: Path | str, few: Path) -> dict[str, dict[str, float]]:
    """Return what drawing takes of one to four steps, and of many with guidance, which calls the model twice a step."""
    slow, fast = load(velocity), load(few)
    ways: dict[str, Callable[[], object]] = {f"velocity, {MANY}": functools.partial(draw, slow, MANY, BATCH, 0)}
    for steps in STEPS[:-1]:
        ways[f"flow_map, {steps}"] = functools.partial(draw, fast, steps, BATCH, 0)
    return time_drawing(ways)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return by recipe and number of steps the means with 95% intervals, and FD over that of the baseline in many.

    Args:
        rows: figures of one recipe, number of steps and seed each: "recipe", "sampling_steps", "seed", "fd", and
            "class_agreement" where there is a judge.
    """
    named = [{**row, "variant": f"{row['recipe']}, {row['sampling_steps']}"} for row in rows]
    found: dict[str, Any] = {}
    for row in named:
        own = [other for other in named if other["variant"] == row["variant"]]
        found.setdefault(row["recipe"], {})[str(row["sampling_steps"])] = {
            **{name: interval([other[name] for other in own]) for name in ("fd", "class_agreement") if name in row},
            "fd_ratio": paired_ratio(named, "fd", row["variant"], f"{BASELINE}, {MANY}"),
        }
    return found


def judged(found: Mapping[str, Any], speed: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return what was to be shown with the best value of the recipes of equal training time, and whether it was met.

    What no judge has measured is left out.
    """
    fair = [name for name in found if RECIPES[name].objective != BASELINE and seconds_in_all(name) == 1]
    rows = []
    for target, (figure, steps, sign, bound) in TARGETS.items():
        if figure == "images_per_second":
            fast, slow = (speed[way][figure] for way in (f"flow_map, {steps}", f"velocity, {MANY}"))
            values = {"flow_map": fast / slow}
        else:
            key = "fd_ratio" if figure == "fd" else figure
            if any(key not in found[name][str(steps)] for name in fair):
                continue
            values = {name: found[name][str(steps)][key]["mean"] for name in fair}
        recipe = (min if sign == "<=" else max)(values, key=lambda name: values[name])
        met = values[recipe] <= bound if sign == "<=" else values[recipe] >= bound
        rows.append(
            {"target": target, "bound": f"{sign} {bound}", "value": values[recipe], "recipe": recipe, "met": met}
        )
    return rows


def study(
    names: Sequence[str], runs: Path, seconds: float, seeds: Sequence[int], data: DataSet = DATA
) -> dict[str, Any]:
    """Train and score what is not there yet, seed by seed, and return figures and intervals."""
    words = {name: arguments(Recipe(name, 1), 100, 0, None, data) for name in OWN}
    milliseconds = calibration.calibrated(runs / "calibration.json", words, clock=time.process_time, sides=data.buckets)
    counts = {name: steps_of(recipe, seconds, milliseconds) for name, recipe in RECIPES.items()}
    rows = []
    for seed in seeds:
        trained = train_all(names, runs, seed, counts, data)
        for name in names:
            run, metrics = trained[name]
            file = run.with_name(f"{run.name}.scores.json")
            scores = once(file, functools.partial(score_run, run, steps_to_score(name), seed, data))
            facts = {key: metrics[key] for key in ("val_loss", "nonfinite_steps", "commit")}
            rows += [
                {"recipe": name, "seed": seed, "steps": counts[name], "sampling_steps": int(count), **facts, **scored}
                for count, scored in scores.items()
            ]
    timed = [directory(runs, seeds[0], name) for name in (BASELINE, "flow_map, half + half")]
    speed = once(runs / "speeds.json", functools.partial(speeds, *timed))
    found = summary(rows)
    return {
        "setting": {
            "data": data.name,
            "model": MODELS[data.name]["model.name"],
            "samples": SAMPLES,
            "seconds": seconds,
            "guidance_scale": GUIDANCE_SCALE,
            "batch": BATCH,
        },
        "processor_milliseconds_per_step": milliseconds,
        "targets": judged(found, speed),
        "summary": found,
        "speed": speed,
        "cells": rows,
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def compare(run: Path) -> dict[str, Any]:
    """Score a run of configs/digits_one_step.yaml beside the packaged model that it starts from, one seed of each."""
    models: dict[str, tuple[Path | str, Sequence[int]]] = {PACKAGED: (PACKAGED, STEPS), run.name: (run, STEPS[:-1])}
    rows = [
        {"recipe": name, "sampling_steps": int(count), **scored}
        for name, (model, steps) in models.items()
        for count, scored in score_run(model, steps, 0).items()
    ]
    (many,) = (row["fd"] for row in rows if row["sampling_steps"] == MANY)
    return {
        "setting": {"samples": SAMPLES, "guidance_scale": GUIDANCE_SCALE, "batch": BATCH},
        "cells": [{**row, "fd_ratio": row["fd"] / many} for row in rows],
        "speed": speeds(PACKAGED, run),
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def study_rows(runs: Path, names: Sequence[str]) -> list[tuple[Path | str, int]]:
    """Return the runs of the first seed and the numbers of steps that a picture shows: distilled ones, and velocity."""
    rows: list[tuple[Path | str, int]] = [(directory(runs, 0, BASELINE), steps) for steps in (MANY, 1)]
    distilled = [name for name in names if name.endswith("half + half")]
    return rows + [(directory(runs, 0, name), steps) for name in distilled for steps in STEPS[:-1]]


def draw_picture(rows: Sequence[tuple[Path | str, int]], file: Path) -> None:
    """Write a picture: columns are classes in turn; rows models and numbers of steps, from the same noise."""
    from PIL import Image

    drawn = []
    for model, steps in rows:
        images = np.pad(draw(load(model), steps, 20, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
        drawn.append(np.concatenate(list(images), axis=1))
    picture = np.concatenate(drawn)
    scale = max(1, 30 * 20 // picture.shape[1])
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file)


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks.few_step", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/few_step"), help="where the runs are kept")
    parser.add_argument("--seconds", type=float, default=40, help="of the processor, for a recipe of share 1")
    scored = [name for name in RECIPES if name != "velocity, half"]  # that one is a teacher alone
    parser.add_argument("--recipes", nargs="+", choices=scored, default=scored, help="what is trained and scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="of the paired runs")
    parser.add_argument("--picture", type=Path, help="PNG file of images side by side")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--distilled", type=Path, metavar="RUN", help="score this beside builtin:digits instead")
    add_data_options(parser, tuple(MODELS))
    options = parser.parse_args()
    (data,) = chosen(options)
    if options.distilled:
        found = compare(options.distilled)
        rows: list[tuple[Path | str, int]] = [(PACKAGED, MANY), (PACKAGED, 1)]
        rows += [(options.distilled, steps) for steps in STEPS[:-1]]
    else:
        found = study(options.recipes, options.runs, options.seconds, options.seeds, data)
        rows = study_rows(options.runs, options.recipes)
    publish(found, options.out)
    if options.picture:
        draw_picture(rows, options.picture)


if __name__ == "__main__":
    run_cli(main)
