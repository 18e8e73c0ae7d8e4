"""What a model trained at one size draws at two and four times that size, unchanged: pictures, and FD of crops.

    python -m benchmarks.resolution --runs gspn=runs/a/run attention=runs/b/run --data digits \\
        --picture docs/resolution.png --out benchmarks/results/resolution.json

A GSPN has no positions, so nothing changes but the grid. Attention with sine and cosine positions is drawn twice: with
positions that go on beyond the training grid, and with positions squeezed into its range. At k times the size two sets
are scored against the training images: one crop of the training size per image, at a place that is a function of the
image's number, and the whole image shrunk by averaging k×k pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.errors import ArgumentParser, UserError, run_cli

if TYPE_CHECKING:
    from gspn_dit.pipeline import GSPNPipeline

SCALES = (1, 2, 4)
SAMPLING_STEPS = 30
GUIDANCE_SCALE = 1.2
PICTURED = 10
"""Images of each model and size in the picture, one per class."""


def crops(images: np.ndarray, size: int) -> np.ndarray:
    """Return one crop [n, size, size, C] per image [n, H, W, C], at a place drawn from the image's number."""
    height, width = images.shape[1:3]
    places = np.random.default_rng(0).integers(0, (height - size + 1, width - size + 1), (len(images), 2))
    return np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, places, strict=True)])


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Return images [n, k·size, k·size, C] averaged over k×k pixels, uint8 [n, size, size, C]."""
    count, height, _, channels = images.shape
    k = height // size
    means = images.reshape(count, size, k, size, k, channels).mean(axis=(2, 4))
    return np.floor(means + 0.5).astype(np.uint8)


def variants(name: str, run: str) -> dict[str, GSPNPipeline]:
    """Load a run; a model with positions comes twice, with its grid continued and with it interpolated."""
    from gspn_dit.models import DiT
    from gspn_dit.pipeline import GSPNPipeline

    plain = GSPNPipeline.from_checkpoint(run)
    if not isinstance(plain.model, DiT) or plain.model.mixer != "attention":
        return {name: plain}
    squeezed = GSPNPipeline.from_checkpoint(run)
    assert isinstance(squeezed.model, DiT)
    squeezed.model.interpolate_positions = True
    return {f"{name}, continued": plain, f"{name}, interpolated": squeezed}


def measure(runs: dict[str, str], data: str, samples: int, picture: str | None) -> dict[str, Any]:
    """Draw every model at every size and score it."""
    from benchmarks.measure import CpuDevice, software
    from benchmarks.quality import DATA_SETS
    from fid.evaluation import score
    from fid.features import load_feature_net
    from fid.images import LabelledImages, Reference

    net = load_feature_net(DATA_SETS[data].features)
    real = DATA_SETS[data].load("train")
    reference = Reference(LabelledImages(real.pixels(), "training images", real.labels))
    size, rows, pictures = real.image_size, [], {}
    for name, pipeline in (pair for item in runs.items() for pair in variants(*item).items()):
        labels = np.arange(samples) % len(pipeline.class_names)
        for scale in SCALES:
            images = pipeline(
                labels.tolist(),
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                seed=0,
                height=scale * size,
                width=scale * size,
                output_type="np",
            ).images
            assert isinstance(images, np.ndarray)
            pictures[f"{name} {scale}x"] = images[:PICTURED]
            for kind, view in (("crops", crops(images, size)), ("shrunk", shrunk(images, size))):
                scores = score(LabelledImages(view, kind, labels), reference, net)["scores"]
                rows.append({"model": name, "scale": scale, "what": kind, "fd": scores[f"FD-{net.score_suffix}"]})
    if picture:
        draw(pictures, picture)
    return {
        "data": data,
        "setting": {"samples": samples, "steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE},
        "rows": rows,
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def draw(pictures: dict[str, np.ndarray], file: str) -> None:
    """Write a picture with a row of images per model and size, all shown equally large."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(pictures), PICTURED, figsize=(PICTURED, 1.1 * len(pictures)), squeeze=False)
    for line, (name, images) in zip(axes, pictures.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        line[0].set_title(name, loc="left", fontsize=8)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure and write the JSON and the picture."""
    parser = ArgumentParser(prog="benchmarks.resolution", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=DIR", help="trained runs")
    parser.add_argument("--data", default="digits", help="a data set of benchmarks.quality")
    parser.add_argument("--samples", type=int, default=500, help="images of each model and size")
    parser.add_argument("--picture", help="write this PNG")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    runs = dict(item.partition("=")[::2] for item in options.runs)
    if not all(runs.values()):
        raise UserError("--runs takes NAME=DIR, such as gspn=runs/demo")
    text = json.dumps(measure(runs, options.data, options.samples, options.picture), indent=2)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
    run_cli(main)
