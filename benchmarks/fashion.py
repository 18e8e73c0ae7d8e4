"""The Fashion-MNIST example in figures and in one picture: originals, what the autoencoder makes of them, samples.

    python -m benchmarks.fashion --run runs/fashion/gspn --data runs/fashion/data --vae runs/fashion/vae \\
        --latents runs/fashion/latents --picture docs/latents.png --out benchmarks/results/fashion.json

docs/latents.md says which commands make these directories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, run_cli

if TYPE_CHECKING:
    import numpy as np

    from gspn_dit.data.images import ImageSet
    from gspn_dit.data.latents import AutoencoderLatent

PSNR_TARGET = 24.0
SAMPLES_PER_CLASS = 4
BATCH = 256


def reconstruct(images: ImageSet, latent: AutoencoderLatent, rows: np.ndarray) -> np.ndarray:
    """Return images decoded from the means of their posteriors, kept in float16 as encoding keeps them."""
    import numpy as np

    parts = []
    for start in range(0, len(rows), BATCH):
        moments = latent.moments(images.pixels(rows[start : start + BATCH]), BATCH).half()
        parts.append(latent.decode(latent.draw(moments)))
    return np.concatenate(parts)


def spread_of_latents(directory: str, latent: AutoencoderLatent) -> dict[str, float]:
    """Return mean and standard deviation of draws from stored latents, which scale and shift should make 0 and 1."""
    import numpy as np
    import torch

    from gspn_dit.data.batches import LatentBatches
    from gspn_dit.data.latent_shards import open_latents

    batches = LatentBatches(open_latents(directory, validation_fraction=0), latent, seed=0)
    draws = torch.cat([batches.shuffled(range(start, start + BATCH))[0] for start in range(0, 4096, BATCH)])
    assert np.isfinite(draws.numpy()).all()
    return {"mean": round(draws.mean().item(), 4), "std": round(draws.std().item(), 4)}


def measure(
    run: str, data: str, vae: str, latents: str, steps: int, guidance_scale: float, picture: str
) -> dict[str, Any]:
    """Draw the picture and return the figures."""
    import numpy as np

    from benchmarks.measure import CpuDevice, software
    from gspn_dit.checkpoint import read_manifest as read_checkpoint
    from gspn_dit.checkpoint import resolve_checkpoint
    from gspn_dit.data.images import load_images
    from gspn_dit.data.latent_shards import read_manifest
    from gspn_dit.data.latents import latent_from_spec
    from gspn_dit.data.self_check import psnr
    from gspn_dit.grid import class_grid, save_png
    from gspn_dit.pipeline import GSPNPipeline
    from gspn_dit.prepare.train_vae import REPORT

    manifest = read_manifest(Path(latents))
    latent: AutoencoderLatent = latent_from_spec(manifest["latent"], vae)  # type: ignore[assignment]
    images = load_images("hf", data, "validation")
    decoded = reconstruct(images, latent, np.arange(len(images)))
    originals = images.pixels()
    pipeline = GSPNPipeline.from_checkpoint(run, vae=vae)
    classes = range(len(pipeline.class_names))
    samples = pipeline(
        [label for _ in range(SAMPLES_PER_CLASS) for label in classes],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    chosen = [int(np.flatnonzero(images.labels == label)[0]) for label in classes]
    tiles = np.concatenate([originals[chosen], decoded[chosen], samples])
    names = ["original", "decoded", *["sample"] * SAMPLES_PER_CLASS]
    rows = np.repeat(np.arange(len(names)), len(chosen))
    save_png(class_grid(tiles, rows, names, scale=2), picture)
    ratio = psnr(originals, decoded)
    return {
        "psnr_db": round(ratio, 3),
        "images": len(images),
        "targets": {"psnr_db": PSNR_TARGET},
        "met": ratio >= PSNR_TARGET,
        "autoencoder": json.loads((Path(vae) / REPORT).read_text(encoding="utf-8")),
        "latents": {"images": manifest["images"], **spread_of_latents(latents, latent)},
        "run": {"steps": read_checkpoint(resolve_checkpoint(run))["step"], "validation_loss": validation_losses(run)},
        "sampling": {"steps": steps, "guidance_scale": guidance_scale},
        "machine": CpuDevice().describe(),
        "versions": software(),
    }


def validation_losses(run: str) -> dict[int, float]:
    """Return the validation loss by step."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line}


def main() -> None:
    """Measure, draw, and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.fashion", description=__doc__.split("\n")[0])
    for name in ("run", "data", "vae", "latents"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    parser.add_argument("--picture", required=True, metavar="FILE", help="PNG of originals, decoded images and samples")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    result = measure(
        options.run,
        options.data,
        options.vae,
        options.latents,
        options.steps,
        options.guidance_scale,
        options.picture,
    )
    publish(result, options.out)


if __name__ == "__main__":
    run_cli(main)
