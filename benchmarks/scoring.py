"""How trained cells of a study are scored: data sets with their feature extractors, samples, figures.

A study runs `python -m benchmarks.scoring DIR --data NAME` in a process of its own for each cell.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import ArgumentParser, UserError, run_cli

if TYPE_CHECKING:
    from gspn_dit.data.images import ImageSet

SETTING: dict[str, Any] = {
    "samples": 1_000,
    "steps": 20,
    "guidance_scale": 1.0,
    "reference": 5_000,
    "sampling_seed": "the cell's",
}
"""How every cell is scored; "reference" are the real images to compare with, evenly spaced, where there are more."""
METRICS = {
    "fd": "FD",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
    "class_agreement": "class agreement",
    "val_loss": "validation loss",
}
"""What is compared, and what tables call it."""


@dataclass(frozen=True)
class DataSet:
    """What is learnt, the patch that cuts it into tokens, and the feature extractor that scores it."""

    config: str
    patch: int
    features: str
    """Weights of the feature extractor: "digits", or a file that `fid.train_features` made."""
    images: tuple[str, str | None]
    """Name and path of the real images, for `load_images`."""
    classes: int
    latent: tuple[int, int]
    """Channels, and pixels of a side."""
    seconds: float
    """Of the processor for a training of the smallest budget."""
    image_size: int | None = None
    """Pixels that images are resized to; None: they are of that size."""

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.latent[1] // self.patch) ** 2

    def arguments(self) -> list[str]:
        """Return the command line of `train.py` that chooses the data."""
        words = ["--config", self.config]
        if self.images[1] is not None and self.image_size is not None:
            words += ["--data.path", self.images[1], "--data.image_size", str(self.image_size)]
        return words

    def load(self, split: str) -> ImageSet:
        """Return the real images of a split."""
        from gspn_dit.data.images import load_images

        return load_images(*self.images, split, image_size=self.image_size)


FASHION_NET = "runs/fashion/features.safetensors"
_FASHION = ("hf", "runs/fashion/data")
_COLOUR = "configs/demo_colour.yaml"
EMOJI_CLASSES = 54
"""Six designs, nine groups."""
DATA_SETS = {
    "digits": DataSet("configs/digits_gspn.yaml", 2, "digits", ("digits", None), 10, (1, 8), 30),
    "fashion": DataSet("configs/fashion_pixels.yaml", 4, FASHION_NET, _FASHION, 10, (1, 32), 120),
    "fashion-latents": DataSet("configs/fashion_gspn.yaml", 1, FASHION_NET, _FASHION, 10, (4, 8), 120),
    "fashion-256": DataSet("configs/fashion_pixels.yaml", 2, FASHION_NET, _FASHION, 10, (1, 32), 240),
    **{
        f"emoji-{tokens}": DataSet(
            *(_COLOUR, patch, f"runs/emoji{size}/features.safetensors", ("imagefolder", f"data/emoji{size}_classes")),
            *(EMOJI_CLASSES, (3, size), seconds, size),
        )
        for size, patch, tokens, seconds in ((32, 2, 256, 240), (64, 2, 1024, 600), (64, 1, 4096, 1800))
    },
}
"""By name; those of emoji are named by their tokens (docs/quality.md says how the data is made)."""


def refuse_other_scores(result: Path) -> None:
    """Raise UserError if what lies in a cell's directory was scored otherwise."""
    if result.exists() and json.loads(result.read_text(encoding="utf-8")).get("setting") != SETTING:
        raise UserError(f"{result.parent} was scored with other settings; delete it to score it anew")


def score_cell(directory: Path, data: str) -> None:
    """Draw a trained cell's samples with the cell's own seed, and write result.json last."""
    import numpy as np

    from benchmarks.demo_quality import training_seconds
    from benchmarks.judge import judge_agreement
    from fid.evaluation import score
    from fid.features import load_feature_net
    from fid.images import LabelledImages, Reference
    from gspn_dit.config import load_config
    from gspn_dit.data.images import evenly_spaced
    from gspn_dit.pipeline import GSPNPipeline

    run = directory / "run"
    seed = load_config(run / "config.yaml").seed
    pipeline = GSPNPipeline.from_checkpoint(run)
    pipeline.set_progress_bar_config(disable=True)
    labels = np.arange(SETTING["samples"]) % len(pipeline.class_names)
    images = pipeline(
        labels.tolist(),
        num_inference_steps=SETTING["steps"],
        guidance_scale=SETTING["guidance_scale"],
        seed=seed,
        output_type="np",
    ).images
    assert isinstance(images, np.ndarray)
    real = {split: DATA_SETS[data].load(split) for split in ("train", "validation")}
    net = load_feature_net(DATA_SETS[data].features)
    rows = {name: evenly_spaced(len(part), SETTING["reference"]) for name, part in real.items()}
    sets = {name: LabelledImages(part.pixels(rows[name]), name, part.labels[rows[name]]) for name, part in real.items()}
    reference = Reference(sets["train"], sets["validation"])
    scores = score(LabelledImages(images, "samples", labels), reference, net)["scores"]
    figures = {
        "fd": scores[f"FD-{net.score_suffix}"],
        "is": scores[f"IS-{net.score_suffix}"]["mean"],
        "precision": scores["precision"],
        "recall": scores["recall"],
        **judge_agreement(images, labels, real["train"], real["validation"]),
        "training_seconds": training_seconds(run)["training_seconds"],
        "val_loss": training_seconds(run)["final_val_loss"],
        "setting": SETTING,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
    }
    partial = directory / "result.json.partial"
    partial.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    partial.replace(directory / "result.json")


def main() -> None:
    """Score one cell."""
    parser = ArgumentParser(prog="benchmarks.scoring", description=__doc__.split("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="of the cell; its run lies in DIR/run")
    parser.add_argument("--data", choices=tuple(DATA_SETS), required=True)
    options = parser.parse_args()
    score_cell(options.directory, options.data)


if __name__ == "__main__":
    run_cli(main)
