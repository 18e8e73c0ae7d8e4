"""Train on a folder of images, one sub-folder per class, and draw each class wider than it was trained.

python examples/own_images.py --images photos --out runs/example --steps 2000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gspn_dit import GSPNPipeline
from gspn_dit.config import TrainArguments, config_from_dict
from gspn_dit.training.loop import train


def main() -> None:
    """Train, or continue where an earlier call was interrupted; then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="folder with one sub-folder per class")
    parser.add_argument("--out", required=True, help="directory of the run")
    parser.add_argument("--model", default="GSPN-T/2", help="preset / patch size")
    parser.add_argument("--size", type=int, default=32, help="pixels to crop and resize to")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    config = config_from_dict(
        {
            "output_dir": options.out,
            "data": {
                "name": "imagefolder",
                "path": options.images,
                "image_size": options.size,
                "horizontal_flip": True,
            },
            "model": {"name": options.model},
            "training": {"max_steps": options.steps, "batch_size": 32, "learning_rate": 2e-3, "trackers": []},
            "sampling": {"steps": 20, "guidance_scale": 2.0},
        }
    )
    train(TrainArguments(config, resume="auto", overwrite=False))

    pipeline = GSPNPipeline.from_pretrained(options.out)
    for name in pipeline.class_names:
        # GSPN has no positional embedding, so the width is free; the model has only seen squares, though.
        image = pipeline(name, height=options.size, width=2 * options.size, num_inference_steps=20).images[0]
        image.save(Path(options.out) / f"{name}.png")


if __name__ == "__main__":
    main()
