"""How good the demo's samples are: class agreement, Fréchet distance, recall and distance to the training images.

    python -m benchmarks.demo_quality --out benchmarks/results/demo.json

trains the demo anew, on one thread, and counts its processor time, which a busy machine stretches little. The setting
is fixed beforehand: 1,000 samples, seed 0, and the demo's sampler steps and guidance. The judge of class agreement is
a support vector machine trained on the training split: another kind of classifier than the feature extractor.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, run_cli

SAMPLES = 1_000
CONFIG = "configs/demo.yaml"
TARGETS = {
    "class_agreement": (">=", 0.97),
    "fd_ratio_at_equal_n": ("<=", 1.8),
    "recall": (">=", 0.5),
    "nearest_distance_ratio": (">=", 0.8),
}


def train(run: Path) -> float:
    """Train the demo into a new directory; return processor seconds, with its start, previews and checkpoints."""
    from benchmarks.study import call

    before = os.times()
    call(["train.py", "--config", CONFIG, "--output_dir", str(run)], run.with_name(f"{run.name}.log"))
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def training_seconds(run: Path) -> dict[str, Any]:
    """Return steps and seconds of the run from its metrics, without validation, grids and checkpoints."""
    from gspn_dit.checkpoint import read_manifest, resolve_checkpoint

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    batch_size = read_manifest(resolve_checkpoint(run))["config"]["training"]["batch_size"]
    seconds, before = 0.0, 0
    for line in logged:
        seconds += (line["step"] - before) * batch_size / line["images_per_second"]
        before = line["step"]
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    return {"steps": before, "training_seconds": round(seconds, 1), "final_val_loss": validation[-1]}


def measure(run: Path, steps: int, guidance_scale: float, seed: int) -> dict[str, Any]:
    """Draw the samples and return every figure."""
    from benchmarks.judge import judge_agreement
    from fid.evaluation import score
    from fid.features import load_feature_net
    from fid.images import LabelledImages, read_reference
    from gspn_dit.data.images import load_images
    from gspn_dit.environment import describe_run
    from gspn_dit.pipeline import GSPNPipeline

    pipeline = GSPNPipeline.from_checkpoint(run)
    pipeline.set_progress_bar_config(disable=None)
    labels = np.arange(SAMPLES) % len(pipeline.class_names)
    images = pipeline(
        labels.tolist(), num_inference_steps=steps, guidance_scale=guidance_scale, seed=seed, output_type="np"
    ).images
    assert isinstance(images, np.ndarray)
    net = load_feature_net("digits")
    report = score(LabelledImages(images, "samples", labels), read_reference("digits", net.image_size), net)
    comparison = report["comparison"]
    figures = {
        **judge_agreement(images, labels, *(load_images("digits", split=split) for split in ("train", "validation"))),
        "fd_ratio_at_equal_n": comparison["fd_ratio_at_equal_n"],
        "recall": comparison["recall_samples"],
        "nearest_distance_ratio": comparison["nearest_distance_ratio"],
    }
    met = {
        name: bool(figures[name] >= bar if sign == ">=" else figures[name] <= bar)
        for name, (sign, bar) in TARGETS.items()
    }
    environment = describe_run()
    return {
        "setting": {"samples": SAMPLES, "seed": seed, "steps": steps, "guidance_scale": guidance_scale},
        "run": training_seconds(run),
        "figures": figures,
        "targets": {name: f"{sign} {bar}" for name, (sign, bar) in TARGETS.items()},
        "met": met,
        "scores": report["scores"],
        "held_out": report["held_out"],
        "comparison": comparison,
        "machine": {**environment["machine"], "load": os.getloadavg()},
        "versions": environment["versions"],
        "git_commit": environment["git_commit"],
    }


def main() -> None:
    """Train, measure and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.demo_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="measure this run of the demo, and train none")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(options.checkpoint or f"{folder}/demo")
        seconds = None if options.checkpoint else round(train(run), 1)
        found = measure(run, options.steps, options.guidance_scale, options.seed)
    found["run"]["processor_seconds"] = seconds
    publish(found, options.out)


if __name__ == "__main__":
    run_cli(main)
