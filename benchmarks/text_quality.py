"""Scans against attention in the same text-to-image UNet, trained on emoji, and scans that are distilled from it.

    python -m gspn_dit.prepare.emoji --packages packages --out data/emoji_food --groups food-drink \\
        --styles noto,twemoji,fluent-emoji-flat
    python -m gspn_dit.prepare.encode_text --data data/emoji_food --max-tokens 16 --out data/emoji_food_texts
    python -m benchmarks run text_quality

The set is small, so that a run of minutes on one thread draws what captions say. Every run is a run of `train.py` on
one thread, in `--runs`, `--jobs` at a time; the command can be stopped and started again, and resumes where it was.
Each mixer trains with its own best of four learning rates, found in short runs of another seed by the validation loss;
a rate is only taken where the next higher one trains as well, since long runs diverge at the edge that short ones pass.
Seconds become steps by timing all mixers in turn, once, by the processor's time: "equal time" is each mixer for so
long, "equal steps" all for as many steps as the first takes. Runs of one seed share data order, noise, times and
captions. Scores (`benchmarks/text_judge.py`) are taken on captions that were seen, on (caption, design) pairs that were
not, and on captions that were not.

The student is the first teacher's UNet with scans, which alone are trained, for a third of its teacher's time. Beside
it stands a control, the same student after two steps.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import calibration
from benchmarks.measure import CpuDevice, software
from benchmarks.output import publish
from benchmarks.study import ROOT, best_rate, interval, once, paired_ratio, train
from benchmarks.text_judge import METRICS, SETS, Judge
from gspn_dit.checkpoint import load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import ArgumentParser, run_cli
from gspn_dit.grid import class_grid, save_png
from gspn_dit.text import load_encoder
from gspn_dit.text_sampler import TextSampler

MIXERS = ("gspn", "attention")
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEARCH_SEED, MAX_TOKENS = 1000, 16
COMMON: dict[str, Any] = {
    "data.caption_column": "text",
    "unet.channels": [32, 64],
    "unet.head_channels": 16,
    "training.batch_size": 16,
    "training.ema_decay": 0.99,
    "sampling.max_classes": 1,  # previews cost time and are not looked at
    "sampling.per_class": 1,
    "sampling.steps": 1,
}
DIVERGED = 2.0
"""Times a mixer's lowest validation loss in the search, above which a run has diverged."""
TIMING_TOLERANCE = 0.05
"""How far medians of the time of a step lie apart for no reason, on a machine that others use as well."""
SHARE_OF_TEACHER = 1 / 3
"""Of the time that a teacher trained, for its student."""
MOST_ABOVE_TEACHER = 1.10
"""What a student's FD may be of its teacher's."""
GRID_COLUMNS = 12
PLACES = ("data", "table", "runs", "grid", "out")
"""Options that say where things are, and change no figure."""
SCORES = [f"{metric}_{name}" for name in SETS for metric in METRICS]


def arguments(options: Any, steps: int, seed: int, rate: float, **unet: Any) -> list[str]:
    """Return the command line of `train.py` for a run, but for its directory."""
    values = {
        **COMMON,
        "data.path": options.data,
        "seed": seed,
        "training.max_steps": steps,
        "training.learning_rate": rate,
        "training.warmup_steps": min(50, steps // 5),
        "training.log_every": max(1, min(25, steps // 10)),
        **{f"training.{kind}_every": max(1, steps) for kind in ("validate", "sample")},
        "training.checkpoint_every": max(1, -(-steps // 3)),
        **{f"unet.{key}": value for key, value in unet.items()},
        **({"text.table": options.table} if options.table else {}),
    }
    words = (word for key, value in values.items() for word in (f"--{key}", str(value)))
    return ["--config", str(ROOT / "configs" / "demo_text.yaml"), *words]


def trained(run: Path, words: list[str]) -> dict[str, Any]:
    """Train a run to its end, unless that is done, and return its facts."""
    found = train(words, run)
    directory = resolve_checkpoint(run)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = {key: found[key] for key in ("val_loss", "nonfinite_steps", "commit")}
    layers = {str(line["step"]): line["loss_layers"] for line in logged if "loss_layers" in line}
    facts |= {
        "pictures": read_manifest(directory)["data"]["images"],
        "parameters": sum(weight.numel() for weight in load_tensors(directory, "model").values()),
    }
    return {"steps": found["step"], **facts, **({"loss_layers": layers} if layers else {})}


def draw(run: Path, judge: Judge, options: Any) -> None:
    """Draw an image of each caption of each set into `drawn-SET.npy` of a run."""
    captions = [caption for name in SETS for caption in judge.captions[name]]
    sampler, guidance = TextSampler.from_checkpoint(run), Guidance(options.guidance_scale)
    drawn = sampler.draw(captions, options.sampler_steps, guidance, seed=7)
    ends = np.cumsum([len(judge.captions[name]) for name in SETS])[:-1]
    for name, images in zip(SETS, np.split(drawn, ends), strict=True):
        np.save(run / f"drawn-{name}.npy", images)


def evaluate(run: Path, judge: Judge, options: Any) -> dict[str, float]:
    """Score images of each caption of each set, by "METRIC_SET"; images and scores are kept in the run."""

    def measure() -> dict[str, float]:
        if not (run / f"drawn-{SETS[-1]}.npy").exists():
            draw(run, judge, options)
        return {
            f"{metric}_{name}": value
            for name in SETS
            for metric, value in judge.scores(name, np.load(run / f"drawn-{name}.npy")).items()
        }

    return once(run / "scores.json", measure)


@dataclass(frozen=True)
class Run:
    """A training: its directory below `--runs`, its arguments, and whether its images are scored."""

    name: str
    words: list[str]
    scored: bool = True


def make(runs: Sequence[Run], judge: Judge, options: Any) -> list[dict[str, Any]]:
    """Train and score runs, `--jobs` at a time, and return the facts and scores of each."""

    def one(run: Run) -> dict[str, Any]:
        place = options.runs / run.name
        facts = trained(place, run.words)
        found = {**facts, **(evaluate(place, judge, options) if run.scored else {})}
        print(json.dumps({"run": run.name, **found}), flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(one, runs))


def calibrated(options: Any, name: str, variants: dict[str, list[str]]) -> dict[str, float]:
    """Return milliseconds of the processor per step, measured once for a directory of runs."""
    file = options.runs / f"calibration-{name}.json"
    return calibration.calibrated(file, variants, options.calibration_rounds, time.process_time)


def steady_rate(losses: Mapping[float, float]) -> dict[str, Any]:
    """Return what `best_rate` does, but the best of the rates below one that trained as well, or else the lowest."""
    rates, bound = sorted(losses), DIVERGED * min(losses.values())
    steady = [rate for rate, above in itertools.pairwise(rates) if losses[above] <= bound]
    best = min(steady or rates[:1], key=lambda rate: losses[rate])
    found = best_rate(losses)
    return {**found, "best": best, "at_an_end": rates[0] == best or rates[-1] == found["best"]}


def best_rates(options: Any, judge: Judge) -> dict[str, Any]:
    """Return each mixer's validation losses by learning rate, and the best rate."""
    tried = [(mixer, rate) for mixer in MIXERS for rate in options.rates]
    runs = [
        Run(f"rate-{mixer}-{rate:g}", arguments(options, options.search_steps, SEARCH_SEED, rate, mixer=mixer), False)
        for mixer, rate in tried
    ]
    losses = {key: found["val_loss"] for key, found in zip(tried, make(runs, judge, options), strict=True)}
    return {mixer: steady_rate({rate: losses[mixer, rate] for rate in options.rates}) for mixer in MIXERS}


def budgets(seconds: float, milliseconds: dict[str, float]) -> dict[str, dict[str, int]]:
    """Return the steps of each mixer in an equal time, and in as many steps as the first one takes then.

    Where all take the same time for a step, as well as it can be told, the two budgets are one.
    """
    fastest = min(milliseconds.values())
    alike = all(time <= (1 + TIMING_TOLERANCE) * fastest for time in milliseconds.values())
    steps = {mixer: max(1, int(1e3 * seconds / milliseconds[MIXERS[0] if alike else mixer])) for mixer in MIXERS}
    return {"equal time": steps, "equal steps": dict.fromkeys(MIXERS, steps[MIXERS[0]])}


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means with 95 % intervals over the seeds; of gspn to attention the ratios of FDs and losses, of the
    other scores the differences."""
    tried, known = ({cell["seed"]: cell for cell in cells if cell["variant"] == mixer} for mixer in MIXERS)
    lower = ["val_loss", *(score for score in SCORES if score.startswith("fd_"))]
    return {
        "means": {
            mixer: {
                score: interval([cell[score] for cell in cells if cell["variant"] == mixer])
                for score in ["val_loss", *SCORES]
            }
            for mixer in MIXERS
        },
        "ratios": {score: paired_ratio(cells, score, *MIXERS) for score in lower},
        "differences": {
            score: interval([tried[seed][score] - known[seed][score] for seed in tried])
            for score in SCORES
            if score not in lower
        },
    }


def compare(options: Any, judge: Judge) -> dict[str, Any]:
    """Search learning rates, and train and score both mixers with every seed under both budgets."""
    rates = best_rates(options, judge)
    words = {mixer: arguments(options, 100, 0, rates[mixer]["best"], mixer=mixer) for mixer in MIXERS}
    milliseconds = calibrated(options, "mixers", words)
    steps = budgets(options.seconds, milliseconds)
    wanted = [
        (seed, budget, mixer, count)
        for seed in options.seeds
        for budget, of_mixers in steps.items()
        for mixer, count in of_mixers.items()
    ]
    runs = {
        run_name(mixer, count, seed): arguments(options, count, seed, rates[mixer]["best"], mixer=mixer)
        for seed, _, mixer, count in wanted
    }
    found = make([Run(name, words) for name, words in runs.items()], judge, options)
    by_name = dict(zip(runs, found, strict=True))
    cells = [
        {
            "budget": budget,
            "variant": mixer,
            "seed": seed,
            "processor_seconds": round(count * milliseconds[mixer] / 1e3, 1),
            **by_name[run_name(mixer, count, seed)],
        }
        for seed, budget, mixer, count in wanted
    ]
    return {
        "rates": rates,
        "processor_milliseconds_per_step": milliseconds,
        "cells": cells,
        "budgets": {name: summary([cell for cell in cells if cell["budget"] == name]) for name in steps},
    }


def run_name(mixer: str, steps: int, seed: int) -> str:
    """Return the directory of a cell below `--runs`."""
    return f"{mixer}-{steps}-steps/seed-{seed}"


def distil(options: Any, judge: Judge, found: dict[str, Any]) -> dict[str, Any]:
    """Train and score the student of the first seed's longest run with attention, and its control."""
    seed = options.seeds[0]
    taught = max(
        (cell for cell in found["cells"] if (cell["variant"], cell["seed"]) == ("attention", seed)),
        key=lambda cell: cell["steps"],
    )
    teacher = options.runs / run_name("attention", taught["steps"], seed)
    rate = options.student_rate or found["rates"]["gspn"]["best"]
    words = functools.partial(arguments, options, seed=seed, rate=rate, mixer="gspn", teacher=teacher)
    milliseconds = calibrated(options, "student", {"student": words(100)})["student"]
    seconds = SHARE_OF_TEACHER * taught["processor_seconds"]
    steps = max(3, int(1e3 * seconds / milliseconds))
    runs = {
        "student": Run("student", words(steps)),
        "two steps": Run("student-2-steps", words(2)),
    }
    of = dict(zip(runs, make(list(runs.values()), judge, options), strict=True))
    ratios = {who: {name: run[f"fd_{name}"] / taught[f"fd_{name}"] for name in SETS} for who, run in of.items()}
    layers = list(of["student"]["loss_layers"].values())
    tenth = max(1, len(layers) // 10)
    return {
        "teacher": taught,
        "learning_rate": rate,
        "processor_seconds": round(steps * milliseconds / 1e3, 1),
        "runs": of,
        "fd_ratios": ratios,
        "targets": {
            "FD of the student ÷ of its teacher, seen captions": [ratios["student"]["train"], MOST_ABOVE_TEACHER],
            "loss of the layers, last tenth ÷ first tenth": [
                float(np.mean(layers[-tenth:]) / np.mean(layers[:tenth])),
                1.0,
            ],
            "non-finite steps": [of["student"]["nonfinite_steps"], 0],
        },
    }


def draw_grid(options: Any, judge: Judge, result: dict[str, Any], file: Path) -> None:
    """Write a picture: a column for each of some captions, rows of real images, of each mixer, and of the student."""
    steps, seed = {cell["variant"]: cell["steps"] for cell in result["cells"]}, options.seeds[0]
    runs = {mixer: options.runs / run_name(mixer, steps[mixer], seed) for mixer in MIXERS}
    if result["distillation"]:
        runs["distilled"] = options.runs / "student"
    images, labels, names = [], [], []
    for name, title in zip(SETS, ("seen", "held-out pairs", "unseen"), strict=True):
        rows = np.linspace(0, len(judge.captions[name]) - 1, GRID_COLUMNS).astype(int)
        drawn = {who: np.load(run / f"drawn-{name}.npy") for who, run in runs.items()}
        for who, pixels in {"real": judge.pixels[name], **drawn}.items():
            images.append(pixels[rows])
            labels += [len(names)] * GRID_COLUMNS
            names.append(f"{title}: {who}")
        print(f"columns, {title}: {'; '.join(judge.captions[name][row] for row in rows)}")
    save_png(class_grid(np.concatenate(images), labels, names), file)


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks.text_quality", description="Compare mixers in a text-to-image UNet.")
    parser.add_argument("--data", required=True, help="what prepare.emoji wrote, of several designs")
    parser.add_argument("--table", help="its captions, encoded by prepare.encode_text with --max-tokens 16")
    parser.add_argument("--runs", type=Path, default=Path("runs/text_quality"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the paired runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one thread each")
    parser.add_argument("--seconds", type=float, default=60, help="of the processor for a run")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to try")
    parser.add_argument("--search-steps", type=int, default=100, help="of runs that try learning rates")
    parser.add_argument("--calibration-rounds", type=int, default=22, help="steps of each mixer that are timed")
    parser.add_argument("--images", type=int, default=59, help="of each set that are drawn and scored, at most")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="when drawing")
    parser.add_argument("--sampler-steps", type=int, default=10, help="when drawing")
    parser.add_argument("--student-rate", type=float, help="learning rate of the distillation; none: that of gspn")
    parser.add_argument("--no-distill", dest="distill", action="store_false", help="leave the distillation out")
    parser.add_argument("--grid", type=Path, help="PNG file of a picture of all")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    judge = Judge(options.data, load_encoder(max_tokens=MAX_TOKENS), options.images, options.runs / "real-train.npy")
    result = {
        "setting": {key: value for key, value in vars(options).items() if key not in PLACES},
        "data": str(options.data),
        "images": {name: len(captions) for name, captions in judge.captions.items()},
        "real": {name: judge.scores(name) for name in SETS},
        **compare(options, judge),
    }
    result["distillation"] = distil(options, judge, result) if options.distill else None
    result |= {"machine": CpuDevice().describe(), "software": software()}
    publish(result, options.out)
    if options.grid:
        draw_grid(options, judge, result, options.grid)


if __name__ == "__main__":
    run_cli(main)
