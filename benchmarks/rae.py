"""A representation autoencoder all the way, in figures and a picture: reconstructions, samples, minutes of one core.

    python -m benchmarks.rae --run runs/emoji/gspn --data data/emoji --vae runs/emoji/rae \\
        --features runs/emoji/features.safetensors --picture docs/rae.png --out benchmarks/results/rae.json

docs/latents.md says which commands make these files. Distances are on a small feature extractor of the same images.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, run_cli

if TYPE_CHECKING:
    import numpy as np

    from gspn_dit.pipeline import GSPNPipeline

ROUNDS = 8
SAMPLES_PER_CLASS = 4
MINUTES_TARGET = 20


def minutes(run: Path, vae: Path, steps: int) -> dict[str, float]:
    """Return what both trainings take of one core: the autoencoder's as measured, the model's by timed steps."""
    from benchmarks.calibration import milliseconds_per_step
    from gspn_dit.prepare.train_vae import REPORT

    words = ["--config", str(run / "config.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        per_step = milliseconds_per_step({"step": words}, Path(folder), ROUNDS, time.process_time)["step"]
    autoencoder = json.loads((vae / REPORT).read_text(encoding="utf-8"))["training_cpu_seconds"] / 60
    model = per_step * steps / 60_000
    found = {"autoencoder": autoencoder, "model": model, "both": autoencoder + model}
    return {key: round(value, 2) for key, value in found.items()}


def draw(pipeline: GSPNPipeline, count: int, steps: int, guidance_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return samples, uint8 [n, H, W, 3], and their classes, in turn."""
    import numpy as np

    labels = np.arange(count) % len(pipeline.class_names)
    images = pipeline(
        labels.tolist(), num_inference_steps=steps, guidance_scale=guidance_scale, seed=0, output_type="np"
    ).images
    assert isinstance(images, np.ndarray)
    return images, labels


def measure(
    run: Path, data: Path, vae: Path, features: Path, samples: int, steps: int, guidance_scale: float, picture: Path
) -> dict[str, Any]:
    """Draw the picture and return the figures."""
    import numpy as np

    from benchmarks.measure import CpuDevice, software
    from fid.evaluation import score
    from fid.features import load_feature_net
    from fid.images import LabelledImages, Reference
    from gspn_dit.checkpoint import read_manifest, resolve_checkpoint
    from gspn_dit.data.images import load_images
    from gspn_dit.data.latents import VAE_BATCH, AutoencoderLatent
    from gspn_dit.grid import class_grid, save_png
    from gspn_dit.pipeline import GSPNPipeline
    from gspn_dit.prepare.reconstruct import reconstruct
    from gspn_dit.protocols import Protocol

    net = load_feature_net(features)
    pipeline = GSPNPipeline.from_checkpoint(run, vae=str(vae))
    latent = pipeline.latent
    assert isinstance(latent, AutoencoderLatent)
    training, held_out = (load_images("imagefolder", str(data), split, channels=3) for split in ("train", "validation"))
    originals, decoded = reconstruct(held_out, latent, np.arange(len(held_out)))
    images, labels = draw(pipeline, samples, steps, guidance_scale)
    real = LabelledImages(training.pixels(), "training images", training.labels)
    own = LabelledImages(originals, "held-out images", held_out.labels)
    of_decoded = LabelledImages(decoded, "held-out images, decoded", held_out.labels)
    paired = Protocol("features", str(features), paired=True)
    drawn = LabelledImages(images, "samples", labels)
    reports = {
        "reconstructions": score(of_decoded, Reference(own), net, protocol=paired),
        "samples": score(drawn, Reference(real, own), net),
        "decoded": score(of_decoded, Reference(real), net),
    }
    classes = range(len(pipeline.class_names))
    chosen = [int(np.flatnonzero(held_out.labels == label)[0]) for label in classes]
    tiles = np.concatenate([originals[chosen], decoded[chosen], images[: SAMPLES_PER_CLASS * len(chosen)]])
    names = ["original", "decoded", *["sample"] * SAMPLES_PER_CLASS]
    save_png(class_grid(tiles, np.repeat(np.arange(len(names)), len(chosen)), names, scale=2), picture)
    step = read_manifest(resolve_checkpoint(run))["step"]
    taken = minutes(run, vae, step)
    return {
        "reconstruction": {
            "images": len(originals),
            "batch_size": VAE_BATCH,
            "scores": reports["reconstructions"]["scores"],
            "intervals": reports["reconstructions"]["intervals"],
        },
        "samples": {"scores": reports["samples"]["scores"], "intervals": reports["samples"]["intervals"]},
        "held_out": reports["samples"]["held_out"],
        "comparison": reports["samples"]["comparison"],
        "held_out_decoded": reports["decoded"]["scores"],
        "feature_net": reports["samples"]["settings"]["feature_net"],
        "sampling": {
            **{"steps": steps, "guidance_scale": guidance_scale, "seed": 0, "sampler": pipeline.objective.samplers[0]},
            "sampling_shift": pipeline.objective.sampling_shift,
        },
        "latent": {"channels": latent.channels, "size": latent.size, "natural_shift": latent.natural_shift},
        "run": {"steps": step, "parameters": sum(weight.numel() for weight in pipeline.model.parameters())},
        "cpu_minutes": taken,
        "targets": {"cpu_minutes": f"<= {MINUTES_TARGET}"},
        "met": taken["both"] <= MINUTES_TARGET,
        "machine": {**CpuDevice().describe(), "load": os.getloadavg()},
        "versions": software(),
    }


def main() -> None:
    """Measure, draw, and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.rae", description=__doc__.split("\n")[0])
    for name in ("run", "data", "vae", "features"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True, help="PNG of originals, decoded images and samples")
    parser.add_argument("--samples", type=int, default=1_044, help="classes in turn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    result = measure(
        options.run,
        options.data,
        options.vae,
        options.features,
        options.samples,
        options.steps,
        options.guidance_scale,
        options.picture,
    )
    publish(result, options.out)


if __name__ == "__main__":
    run_cli(main)
