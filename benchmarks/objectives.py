"""Both objectives learn the digits: class agreement of every sampler, and Fréchet distance of the default one.

    python -m benchmarks.objectives --runs runs --out benchmarks/results/objectives.json

trains configs/digits_gspn.yaml (velocity) and configs/digits_gspn_epsilon.yaml into RUNS, or resumes what is there, and
draws from both. The setting is fixed beforehand: seed 0, 50 steps, the guidance of the config's previews, 1,000 samples
of the objective's default sampler and 128 of each other. The judge is a support vector machine, `benchmarks/judge.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo_quality import SAMPLES, training_seconds
from benchmarks.judge import judge_agreement
from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"velocity": "digits_gspn.yaml", "epsilon": "digits_gspn_epsilon.yaml"}
STEPS, SEED, SAMPLES_OF_OTHERS = 50, 0, 128
LEAST_AGREEMENT = 0.9
"""What the default sampler of each objective must reach."""


def train(objective: str, run: Path) -> None:
    """Train a config to its end, or resume; does nothing where that was done before."""
    config = ROOT / "configs" / CONFIGS[objective]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config)]
    done = subprocess.run([*command, "--output_dir", str(run), "--resume", "auto"], check=False)
    if done.returncode:
        raise UserError(f"training {config} failed")


def judge_sampler(pipeline: Any, sampler: str, guidance_scale: float, splits: dict[str, Any]) -> dict[str, Any]:
    """Draw with a sampler and return its figures."""
    default = sampler == pipeline.objective.samplers[0]
    count = SAMPLES if default else SAMPLES_OF_OTHERS
    labels = np.arange(count) % len(pipeline.class_names)
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "sampler": sampler, "seed": SEED}
    began = time.perf_counter()
    images = pipeline(labels.tolist(), output_type="np", **options).images
    figures = {
        "samples": count,
        "seconds": round(time.perf_counter() - began, 1),
        **judge_agreement(images, labels, splits["train"], splits["validation"]),
    }
    return {**figures, **frechet_distance(images, labels)} if default else figures


def frechet_distance(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the Fréchet distance to the training images in the bundled net's features, and its ratio to held-out."""
    from fid.evaluation import score
    from fid.features import load_feature_net
    from fid.images import LabelledImages, read_reference

    net = load_feature_net("digits")
    report = score(LabelledImages(images, "samples", labels), read_reference("digits", net.image_size), net)
    ratio = report["comparison"]["fd_ratio_at_equal_n"]
    return {"FD-digits": report["scores"]["FD-digits"], "fd_ratio_at_equal_n": ratio}


def measure(objective: str, runs: Path) -> dict[str, Any]:
    """Train with an objective, draw with all its samplers and return every figure."""
    from gspn_dit.config import load_config
    from gspn_dit.data.images import load_images
    from gspn_dit.environment import describe_run
    from gspn_dit.pipeline import GSPNPipeline

    path = ROOT / "configs" / CONFIGS[objective]
    run, guidance_scale = runs / path.stem, load_config(path).sampling.guidance_scale
    train(objective, run)
    splits = {split: load_images("digits", split=split) for split in ("train", "validation")}
    pipeline = GSPNPipeline.from_checkpoint(run)
    pipeline.set_progress_bar_config(disable=True)
    samplers = {}
    for name in pipeline.objective.samplers:
        samplers[name] = judge_sampler(pipeline, name, guidance_scale, splits)
        print(f"{objective}, {name}: {json.dumps(samplers[name])}", flush=True)
    environment = describe_run()
    return {
        "config": f"configs/{path.name}",
        "setting": {"steps": STEPS, "seed": SEED, "guidance_scale": guidance_scale},
        "run": training_seconds(run),
        "samplers": samplers,
        "met": {"class_agreement": samplers[pipeline.objective.samplers[0]]["class_agreement"] >= LEAST_AGREEMENT},
        "machine": {**environment["machine"], "load": os.getloadavg()},
        "versions": environment["versions"],
        "git_commit": environment["git_commit"],
    }


def main() -> None:
    """Measure and write the JSON; with --only, what it holds of the other objective stays."""
    parser = ArgumentParser(prog="benchmarks.objectives", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs", help="directory of the two runs")
    parser.add_argument("--only", choices=tuple(CONFIGS), help="one objective alone")
    parser.add_argument("--out", help="write the JSON here")
    options = parser.parse_args()
    chosen = [options.only] if options.only else list(CONFIGS)
    results = {objective: measure(objective, Path(options.runs)) for objective in chosen}
    there = options.only and options.out and Path(options.out).exists()
    before = json.loads(Path(options.out).read_text(encoding="utf-8"))["objectives"] if there else {}
    target = f">= {LEAST_AGREEMENT} with the default sampler, the first"
    publish({"targets": {"class_agreement": target}, "objectives": {**before, **results}}, options.out)
    if not all(result["met"]["class_agreement"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
