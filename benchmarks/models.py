"""GSPN-XL/2 against DiT-XL/2: images per second of a training step and of a forward pass, peak memory, a resumed run.

    python -m benchmarks.models --device cuda --out benchmarks/results/models.json

Each model is measured in a process of its own, on random latents; then train.py trains it for half of `--train-steps`
on handwritten digits of the same size, and a second process resumes it and trains the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("GSPN-XL/2", "DiT-XL/2")
WARM_UPS = 3
NUM_CLASSES, LATENT_CHANNELS = 1000, 4


def _timed(run: Callable[[], None], steps: int, batch: int, synchronize: Callable[[], None]) -> dict[str, float]:
    """Return images per second of the fastest and the median step, after some that warm up."""
    seconds = []
    for step in range(WARM_UPS + steps):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        if step >= WARM_UPS:
            seconds.append(time.perf_counter() - began)
    best, median = min(seconds), statistics.median(seconds)
    return {
        "images_per_second": round(batch / best, 3),
        "median_images_per_second": round(batch / median, 3),
        "best_ms": round(1e3 * best, 3),
        "spread": round(median / best - 1, 4),
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one model in this process: a step with clipping and AdamW, then forward passes; float32 weights."""
    import torch

    from benchmarks.measure import status_bytes
    from gspn_dit.models import create_model

    torch.manual_seed(0)
    on_gpu = options.device == "cuda"
    model = create_model(name, NUM_CLASSES, LATENT_CHANNELS, options.latent_size).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    latents = torch.randn(options.batch, LATENT_CHANNELS, options.latent_size, options.latent_size)
    latents, labels = latents.to(options.device), (torch.arange(options.batch) % NUM_CLASSES).to(options.device)
    times = torch.full((options.batch,), 500.0, device=options.device)
    compiled = torch.compile(model) if options.compile else model

    def predict() -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return compiled(latents, times, labels)

    def train_step() -> None:
        (predict().float() - latents).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        predict()

    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    results: dict[str, Any] = {"name": name, "parameters": sum(p.numel() for p in model.parameters())}
    for what, run in (("train_step", train_step), ("forward", forward)):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        results[what] = _timed(run, options.steps, options.batch, synchronize)
        peak = torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")
        results[what]["peak_bytes"] = peak
    return results


def train_and_resume(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train by train.py, half of the steps in each of two processes; every step must be there once."""
    half = options.train_steps // 2
    with tempfile.TemporaryDirectory() as folder:
        shared = [
            *("--config", str(ROOT / "configs" / "digits_gspn.yaml"), "--output_dir", folder, "--model.name", name),
            *("--data.image_size", str(options.latent_size), "--training.batch_size", str(options.batch)),
            *("--training.mixed_precision", "bf16" if options.dtype == "bfloat16" else "no"),
            *("--training.compile", str(options.compile).lower(), "--training.learning_rate", "1.0e-4"),
            *("--training.log_every", "1", "--training.validate_every", "1000000"),
            *("--training.sample_every", "1000000", "--training.checkpoint_every", str(half)),
            *("--training.warmup_steps", "0", "--training.learning_rate_schedule", "constant"),
        ]
        for last, more in ((half, []), (options.train_steps, ["--resume", "auto"])):
            command = [sys.executable, "train.py", *shared, "--training.max_steps", str(last), *more]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{name} did not train to step {last}: {why}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    if sorted(losses) != list(range(1, options.train_steps + 1)) or None in losses.values():
        raise UserError(f"{name}: after its resume the run has losses for {len(losses)} of {options.train_steps} steps")
    ends = {"first": losses[1], "before": losses[half], "after": losses[half + 1], "last": losses[options.train_steps]}
    rates = [line["images_per_second"] for line in lines[1:] if line.get("images_per_second")]
    return {
        "steps": options.train_steps,
        "resumed_at": half,
        "loss": ends,
        "median_images_per_second": statistics.median(rates),
    }


def _in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.models", "--only", name, "--device", options.device]
    command += ["--batch", str(options.batch), "--latent-size", str(options.latent_size)]
    command += ["--steps", str(options.steps), "--dtype", options.dtype, *(["--compile"] if options.compile else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name} could not be measured: {why}")
    return json.loads(done.stdout)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every model; the first one's figures over the second one's."""
    from benchmarks.measure import CpuDevice, software
    from benchmarks.scan_cuda import CudaDevice

    models = []
    for name in options.models:
        models.append(_in_a_process(name, options))
        if options.train_steps:
            models[-1]["training"] = train_and_resume(name, options)
        print(json.dumps(models[-1]), file=sys.stderr, flush=True)
    ratios = {}
    if len(models) == 2:
        ours, theirs = models
        for what in ("train_step", "forward"):
            speed, memory = (ours[what][key] / theirs[what][key] for key in ("images_per_second", "peak_bytes"))
            ratios[what] = {"images_per_second": round(speed, 4), "peak_bytes": round(memory, 4)}
    device = CudaDevice() if options.device == "cuda" else CpuDevice()
    settings = ("device", "batch", "latent_size", "dtype", "compile", "steps")
    return {
        "settings": {name: getattr(options, name) for name in settings},
        "models": models,
        "ratio": ratios,
        "machine": {**device.describe(), **software()},
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--latent-size", type=int, default=32, help="latent pixels; twice the tokens per side")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--train-steps", type=int, default=100, help="steps of the run that is resumed; 0: none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the activations")
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    parser.add_argument("--only", metavar="NAME", help="time this model alone, in this process")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here as well")
    options = parser.parse_args(arguments)
    for name in ("batch", "latent_size", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    if options.train_steps == 1 or options.train_steps < 0:
        raise UserError(f"--train-steps is {options.train_steps}, but must be 0 or at least 2")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the JSON."""
    options = _options(arguments)
    if options.device == "cuda":
        from gspn_dit.ops.cuda.binding import problem

        if (reason := problem()) is not None:
            raise UserError(f"the models cannot be measured on a GPU: {reason}")
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    publish(compare(options), options.out)


if __name__ == "__main__":
    run_cli(main)
