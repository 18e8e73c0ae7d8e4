"""Scans against attention in the same text-to-image UNet, trained on emoji, and scans that are distilled from it.

    python -m benchmarks.text_quality --data data/emoji --seconds 180 --out benchmarks/results/text_quality.json

Every run is a run of `train.py` on one thread, in `--runs`; the command can be stopped and started again, and resumes
where it was. Each mixer trains with its own best of four learning rates, found in short runs of another seed by the
validation loss. Seconds become steps by timing all mixers in turn, once, by the processor's time: "equal time" is
each mixer for so long, "equal steps" all for as many steps as the first takes. Runs of one seed share data order,
noise, times and captions. Scores (`benchmarks/text_judge.py`) are taken on captions that were seen, on (caption,
design) pairs that were not, and on captions that were not.

The student is the first teacher's UNet with scans, which alone are trained, for a third of its teacher's time.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import calibration
from benchmarks.measure import CpuDevice, software
from benchmarks.study import ROOT, interval, paired_ratio, train
from benchmarks.text_judge import METRICS, SETS, Judge
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import ArgumentParser, run_cli
from gspn_dit.grid import class_grid, save_png
from gspn_dit.text import load_encoder
from gspn_dit.text_sampler import TextSampler

MIXERS = ("gspn", "attention")
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
SEARCH_SEED, MAX_TOKENS = 1000, 16
COMMON: dict[str, Any] = {
    "data.caption_column": "text",
    "unet.channels": [32, 64],
    "training.batch_size": 32,
    "training.ema_decay": 0.99,
    "sampling.max_classes": 1,  # previews cost time and are not looked at
    "sampling.per_class": 1,
    "sampling.steps": 1,
}
SHARE_OF_TEACHER = 1 / 3
"""Of the time that a teacher trained, for its student."""
MOST_ABOVE_TEACHER = 1.10
"""What a student's FD may be of its teacher's."""
GRID_COLUMNS = 12
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
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = {key: found[key] for key in ("val_loss", "nonfinite_steps", "commit")}
    layers = {str(line["step"]): line["loss_layers"] for line in logged if "loss_layers" in line}
    return {"steps": found["step"], **facts, **({"loss_layers": layers} if layers else {})}


def evaluate(run: Path, judge: Judge, options: Any) -> dict[str, float]:
    """Draw an image of each caption of each set and score them, by "METRIC_SET"; kept in the run."""
    file = run / "scores.json"
    if not file.is_file():
        sampler, scores = TextSampler.from_checkpoint(run), {}
        for name, captions in judge.captions.items():
            images = sampler.draw(captions, options.sampler_steps, Guidance(options.guidance_scale), seed=7)
            np.save(run / f"drawn-{name}.npy", images)
            scores |= {f"{metric}_{name}": value for metric, value in judge.scores(name, images).items()}
        file.write_text(json.dumps(scores), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def calibrated(options: Any, name: str, variants: dict[str, list[str]]) -> dict[str, float]:
    """Return milliseconds of the processor per step, measured once for a directory of runs."""
    file = options.runs / f"calibration-{name}.json"
    return calibration.calibrated(file, variants, options.calibration_rounds, time.process_time)


def best_rates(options: Any) -> dict[str, Any]:
    """Return each mixer's validation losses by learning rate, and the best rate."""
    found = {}
    for mixer in MIXERS:
        losses = {}
        for rate in options.rates:
            words = arguments(options, options.search_steps, SEARCH_SEED, rate, mixer=mixer)
            losses[rate] = trained(options.runs / f"rate-{mixer}-{rate:g}", words)["val_loss"]
        found[mixer] = {"losses": losses, "best": min(losses, key=lambda rate: losses[rate])}
    return found


def budgets(seconds: float, milliseconds: dict[str, float]) -> dict[str, dict[str, int]]:
    """Return the steps of each mixer in an equal time, and in as many steps as the first one takes then."""
    steps = {mixer: max(1, int(1e3 * seconds / milliseconds[mixer])) for mixer in MIXERS}
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
    rates = best_rates(options)
    words = {mixer: arguments(options, 100, 0, rates[mixer]["best"], mixer=mixer) for mixer in MIXERS}
    milliseconds = calibrated(options, "mixers", words)
    steps, cells = budgets(options.seconds, milliseconds), []
    for seed in options.seeds:
        for budget, of_mixers in steps.items():
            for mixer, count in of_mixers.items():
                run = options.runs / f"{mixer}-{count}-steps" / f"seed-{seed}"
                facts = trained(run, arguments(options, count, seed, rates[mixer]["best"], mixer=mixer))
                scores = evaluate(run, judge, options)
                seconds = round(count * milliseconds[mixer] / 1e3, 1)
                cell = {"budget": budget, "variant": mixer, "seed": seed, "processor_seconds": seconds}
                cells.append({**cell, **facts, **scores})
                print(json.dumps(cells[-1]), flush=True)
    return {
        "rates": rates,
        "processor_milliseconds_per_step": milliseconds,
        "cells": cells,
        "budgets": {name: summary([cell for cell in cells if cell["budget"] == name]) for name in steps},
    }


def distil(options: Any, judge: Judge, found: dict[str, Any]) -> dict[str, Any]:
    """Train and score the student of the first seed's longest run with attention, and train it in bf16 as well."""
    (taught, *_) = sorted(
        (cell for cell in found["cells"] if (cell["variant"], cell["seed"]) == ("attention", options.seeds[0])),
        key=lambda cell: -cell["steps"],
    )
    teacher = options.runs / f"attention-{taught['steps']}-steps" / f"seed-{options.seeds[0]}"
    rate = options.student_rate or found["rates"]["gspn"]["best"]
    make = functools.partial(arguments, options, seed=options.seeds[0], rate=rate, mixer="gspn", teacher=teacher)
    milliseconds = calibrated(options, "student", {"student": make(100)})["student"]
    steps = max(1, int(SHARE_OF_TEACHER * 1e3 * taught["processor_seconds"] / milliseconds))
    facts = trained(options.runs / "student", make(steps))
    scores = evaluate(options.runs / "student", judge, options)
    bf16 = trained(options.runs / "student-bf16", [*make(steps), "--training.mixed_precision", "bf16"])
    ratios = {name: scores[f"fd_{name}"] / taught[f"fd_{name}"] for name in SETS}
    layers = list(facts["loss_layers"].values())
    return {
        "teacher": taught,
        "student": {
            **facts,
            **scores,
            "learning_rate": rate,
            "processor_seconds": round(steps * milliseconds / 1e3, 1),
        },
        "bf16": bf16,
        "fd_ratio": ratios,
        "targets": {
            "seen captions: FD of the student / of its teacher": [ratios["train"], MOST_ABOVE_TEACHER],
            "loss of the layers: last tenth / first tenth": [
                float(np.mean(layers[-max(1, len(layers) // 10) :]) / np.mean(layers[: max(1, len(layers) // 10)])),
                1.0,
            ],
            "non-finite steps in bf16": [bf16["nonfinite_steps"], 0],
        },
    }


def draw_grid(options: Any, judge: Judge, result: dict[str, Any], file: Path) -> None:
    """Write a picture: a column for each of some captions, rows of real images, of each mixer, and of the student."""
    steps, seed = {cell["variant"]: cell["steps"] for cell in result["cells"]}, options.seeds[0]
    runs = {mixer: options.runs / f"{mixer}-{steps[mixer]}-steps" / f"seed-{seed}" for mixer in MIXERS}
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
    parser.add_argument("--data", required=True, help="what prepare.emoji wrote")
    parser.add_argument("--table", help="its captions, encoded by prepare.encode_text with --max-tokens 16")
    parser.add_argument("--runs", type=Path, default=Path("runs/text_quality"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the paired runs")
    parser.add_argument("--seconds", type=float, default=180, help="of a run, on one idle core")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to try")
    parser.add_argument("--search-steps", type=int, default=120, help="of runs that try learning rates")
    parser.add_argument("--calibration-rounds", type=int, default=22, help="steps of each mixer that are timed")
    parser.add_argument("--images", type=int, default=250, help="of each set that are drawn and scored, at most")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="when drawing")
    parser.add_argument("--sampler-steps", type=int, default=12, help="when drawing")
    parser.add_argument("--student-rate", type=float, help="learning rate of the distillation; none: that of gspn")
    parser.add_argument("--no-distill", dest="distill", action="store_false", help="leave the distillation out")
    parser.add_argument("--grid", type=Path, help="PNG file of a picture of all")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    judge = Judge(options.data, load_encoder(max_tokens=MAX_TOKENS), options.images, options.runs / "real-train.npy")
    result = {
        "setting": {key: value for key, value in vars(options).items() if not isinstance(value, Path)},
        "images": {name: len(captions) for name, captions in judge.captions.items()},
        "real": {name: judge.scores(name) for name in SETS},
        **compare(options, judge),
    }
    result["distillation"] = distil(options, judge, result) if options.distill else None
    result |= {"machine": CpuDevice().describe(), "software": software()}
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.grid:
        draw_grid(options, judge, result, options.grid)
    print(text)


if __name__ == "__main__":
    run_cli(main)
