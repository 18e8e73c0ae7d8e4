"""How trained cells of a study are scored: data sets with their feature extractors, samples, figures.

A study runs `python -m benchmarks.scoring DIR --data NAME` in a process of its own for each cell.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import write_atomically

if TYPE_CHECKING:
    from fid.features import FeatureNet
    from gspn_dit.data.images import ImageSet
    from gspn_dit.pipeline import GSPNPipeline

SETTING: dict[str, Any] = {
    "steps": 20,
    "guidance_scale": 1.0,
    "reference": 5_000,
    "sampling_seed": "the cell's",
}
"""How every cell is scored, whatever the data; "reference" are the real images to compare with, evenly spaced, where
there are more."""
SAMPLES = "samples.npz"
"""Of a cell that was scored, in its directory."""
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

    name: str
    config: str
    patch: int
    features: str
    """The feature extractor: "digits", a file that `fid.train_features` made, or a run of task classification."""
    images: tuple[str, str | None]
    """Name and path of the real images, for `load_images`."""
    classes: int
    latent: tuple[int, int]
    """Channels, and pixels of a side."""
    seconds: float
    """Of the processor for a training of the smallest budget."""
    scoring_seconds: float
    """Of the processor for a cell beside its training: two starts, samples, figures; measured, and for plans alone."""
    image_size: int | None = None
    """Pixels that images are resized to; None: they are of that size."""
    own_latents: bool = False
    """The config names latents to train on; the images are compared with alone."""
    buckets: tuple[int, ...] = ()
    """Pixels of the sides of training images, of which each size has as many; none: all are of the size above."""
    batch: int | None = None
    """Images of a training step, so that a short training has some hundred steps; None: as many as the config says."""
    samples: int = 1_000
    """That are drawn of a cell."""
    judged: bool = True
    """A support vector machine tells its classes in pixels well enough to judge samples."""

    @property
    def setting(self) -> dict[str, Any]:
        """How every cell is scored."""
        return {"samples": self.samples, **SETTING}

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.latent[1] // self.patch) ** 2

    def at(self, root: str | None, features: str | None) -> DataSet:
        """Return this with images and feature extractor at other places; None: where they are.

        A class is a folder of an image folder's training split.
        """
        kind, found = self.images[0], self
        if root is not None:
            if self.images[1] is None:
                raise UserError(f"--root is {root}, but {self.name} are bundled; leave it out")
            found = dataclasses.replace(found, images=(kind, str(Path(root).absolute())))
            split = Path(root, "train")
            if kind == "imagefolder" and split.is_dir():
                found = dataclasses.replace(found, classes=sum(entry.is_dir() for entry in split.iterdir()))
        if features is not None:
            place = Path(features)
            found = dataclasses.replace(found, features=str(place.absolute()) if place.exists() else features)
        return found

    def net(self) -> dict[str, Any]:
        """Return what a study says of its feature extractor; see `told_of`."""
        from fid.features import load_feature_net

        return told_of(load_feature_net(self.features))

    def check(self) -> None:
        """Score real images as if they were samples; raises UserError if images or feature extractor do not serve."""
        from gspn_dit.data.images import evenly_spaced

        if self.images[1] is not None and not Path(self.images[1]).is_dir():
            raise UserError(f"{self.name}: no images at {self.images[1]}; docs/quality.md makes them, or give --root")
        real = self.load("train")
        if (there := len(real.class_names)) != self.classes:
            raise UserError(f"{self.name}: {self.images[1]} has {there} classes, but {self.classes} are planned for")
        rows = evenly_spaced(len(real), self.samples)
        self.scores(real.pixels(rows), real.labels[rows], self.samples)

    def arguments(self) -> list[str]:
        """Return the command line of `train.py` that chooses the data."""
        words = ["--config", self.config]
        if self.images[1] is not None and not self.own_latents:
            words += ["--data.path", self.images[1]]
        if self.image_size is not None:
            words += ["--data.image_size", str(self.image_size)]
        if self.buckets:
            words += ["--data.buckets", str([f"{side}x{side}" for side in self.buckets])]
        if self.batch is not None:
            words += ["--training.batch_size", str(self.batch)]
        return words

    def scoring_arguments(self) -> list[str]:
        """Return the command line of `benchmarks.scoring` that chooses the data."""
        words = ["--data", self.name, "--features", self.features]
        return words if self.images[1] is None else [*words, "--root", self.images[1]]

    def load(self, split: str) -> ImageSet:
        """Return the real images of a split."""
        from gspn_dit.data.images import load_images

        return load_images(*self.images, split, image_size=self.image_size)

    def scores(self, images: np.ndarray, labels: np.ndarray, reference: int) -> dict[str, float]:
        """Return the figures of samples, all of `METRICS` but the loss; class agreement where samples are judged.

        Args:
            images: uint8 [n, H, W, C].
            labels: the classes that were asked for, [n].
            reference: real images to compare with, evenly spaced, where the training split has more.
        """
        from benchmarks.judge import judge_agreement
        from fid.cache import default_directory
        from fid.evaluation import score
        from fid.features import load_feature_net
        from fid.images import LabelledImages, Reference
        from gspn_dit.data.images import evenly_spaced

        real, net = self.load("train"), load_feature_net(self.features)
        rows = evenly_spaced(len(real), reference)
        # without their labels: the feature extractor may know other classes, and is not asked for them
        compared = Reference(LabelledImages(real.pixels(rows), "train"))
        scores = score(LabelledImages(images, "samples"), compared, net, cache=default_directory())["scores"]
        return {
            "fd": scores[f"FD-{net.score_suffix}"],
            "is": scores[f"IS-{net.score_suffix}"]["mean"],
            "precision": scores["precision"],
            "recall": scores["recall"],
            **(judge_agreement(images, labels, real, self.load("validation")) if self.judged else {}),
        }


def told_of(net: FeatureNet) -> dict[str, Any]:
    """Return which feature extractor it is: what its scores are called, its hash, features and architecture."""
    found = {"score": net.score_suffix, "sha256": net.sha256, "features": net.feature_dim}
    architecture = net.description.get("architecture")
    return found if architecture is None else {**found, "architecture": architecture}


FASHION_NET = "runs/fashion/features.safetensors"
_FASHION = ("hf", "runs/fashion/data")
_PIXELS, _COLOUR = "configs/fashion_pixels.yaml", "configs/demo_colour.yaml"
EMOJI_CLASSES = 54
"""Six designs, nine groups, of emoji as docs/quality.md makes them."""


def _emoji(name: str, size: int, patch: int, batch: int | None, *seconds: float, samples: int = 1_000) -> DataSet:
    features, images = f"runs/emoji{size}/features.safetensors", ("imagefolder", f"data/emoji{size}_classes")
    places = features, images, EMOJI_CLASSES, (3, size)
    of_cells = {"image_size": size, "batch": batch, "samples": samples}
    return DataSet(name, _COLOUR, patch, *places, *seconds, **of_cells, judged=False)


DATA_SETS = {
    one.name: one
    for one in (
        DataSet("digits", "configs/digits_gspn.yaml", 2, "digits", ("digits", None), 10, (1, 8), 30, 25),
        DataSet("fashion", _PIXELS, 4, FASHION_NET, _FASHION, 10, (1, 32), 120, 50),
        DataSet(
            *("fashion-latents", "configs/fashion_gspn.yaml", 1, FASHION_NET, _FASHION, 10, (4, 8), 120, 50),
            own_latents=True,
        ),
        DataSet("fashion-256", _PIXELS, 2, FASHION_NET, _FASHION, 10, (1, 32), 240, 115, batch=32),
        _emoji("emoji", 32, 4, None, 120, 45),
        dataclasses.replace(
            _emoji("emoji-sizes", 64, 2, 16, 150, 60),
            **{"features": "runs/emoji32_judge", "latent": (3, 32), "image_size": 32, "buckets": (32, 64)},
        ),
        _emoji("emoji-256", 32, 2, 32, 240, 115),
        _emoji("emoji-1024", 64, 2, 8, 600, 150, samples=300),
        _emoji("emoji-4096", 64, 1, 8, 1800, 270, samples=160),
    )
}
"""By name; "emoji" is that of `make demo-colour`, the others are named by their tokens (docs/quality.md makes them).
"emoji-sizes" trains on images of 32×32 and of 64×64 pixels, and is scored at 32×32."""


def add_data_options(
    parser: argparse.ArgumentParser, names: Sequence[str], several: bool = False, default: str | None = "digits"
) -> None:
    """Add what chooses data sets and says where they lie; see `chosen`."""
    if several:
        parser.add_argument("--data", nargs="+", choices=names, default=[default], help="what is learnt")
    else:
        parser.add_argument("--data", choices=names, default=default, required=default is None, help="what is learnt")
    prefix = "NAME=" if several else ""
    parser.add_argument("--root", nargs="+", default=[], metavar=f"{prefix}DIR", help="where the images lie, if not "
                        "where docs/quality.md makes them")  # fmt: skip
    parser.add_argument("--features", nargs="+", default=[], metavar=f"{prefix}NET", help="feature extractor: a file "
                        "of fid.train_features, or a run of task classification")  # fmt: skip


def chosen(options: argparse.Namespace) -> list[DataSet]:
    """Return the data sets that the options of `add_data_options` chose.

    A place is a path, or NAME=PATH where there are several data sets; raises UserError where it is none's.
    """
    names = list(dict.fromkeys([options.data] if isinstance(options.data, str) else options.data))
    places = {flag: by_name(names, f"--{flag}", getattr(options, flag)) for flag in ("root", "features")}
    return [DATA_SETS[name].at(places["root"].get(name), places["features"].get(name)) for name in names]


def by_name(names: Sequence[str], flag: str, given: Sequence[str]) -> dict[str, str]:
    """Return the values by data set of words NAME=VALUE, or of one VALUE where there is one data set.

    Data sets that are not among the names may have values, too, so that a study is narrowed by `--data` alone. Raises
    UserError for one that has two, and for a VALUE that could be any one's.
    """
    found: dict[str, str] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or name not in DATA_SETS:
            name, path = names[0], word
            if len(names) > 1:
                raise UserError(f"{flag} is {word}, but must be NAME=VALUE where there are several data sets")
        if name in found:
            raise UserError(f"{flag} is {word}, but {name} is given twice")
        found[name] = path
    return found


def with_seconds(data: Sequence[DataSet], given: Sequence[str]) -> list[DataSet]:
    """Return data sets with the seconds that words NAME=S give them; raises UserError for what is no number above 0."""
    found = by_name([one.name for one in data], "--seconds", given)
    return [dataclasses.replace(one, seconds=_seconds(found.get(one.name, f"{one.seconds}"))) for one in data]


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds is {word}, but must be a number above 0")
    return seconds


def refuse_other_scores(result: Path, setting: dict[str, Any]) -> None:
    """Raise UserError if what lies in a cell's directory was scored otherwise."""
    if result.exists() and json.loads(result.read_text(encoding="utf-8")).get("setting") != setting:
        raise UserError(f"{result.parent} was scored with other settings; delete it to score it anew")


def load(run: Path | str) -> GSPNPipeline:
    """Return a run's pipeline without its progress bar."""
    from gspn_dit.pipeline import GSPNPipeline

    pipeline = GSPNPipeline.from_checkpoint(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: GSPNPipeline, count: int, steps: int, guidance_scale: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images of all classes in turn, uint8 [count, H, W, C], and their classes, [count].

    A model that has learnt its guidance is not guided again.
    """
    labels = np.arange(count) % len(pipeline.class_names)
    guidance = {} if pipeline.objective.second_time else {"guidance_scale": guidance_scale}
    images = pipeline(labels.tolist(), num_inference_steps=steps, seed=seed, output_type="np", **guidance).images
    assert isinstance(images, np.ndarray)
    return images, labels


def save_samples(file: Path, images: np.ndarray) -> None:
    """Keep a cell's samples, uint8 [n, H, W, C], for `benchmarks.second_look`."""
    content = io.BytesIO()
    np.savez_compressed(content, images=images)
    write_atomically(file, content.getvalue())


def load_samples(file: Path) -> np.ndarray:
    """Return what `save_samples` kept."""
    with np.load(file) as content:
        return np.asarray(content["images"])


def score_cell(directory: Path, data: DataSet) -> None:
    """Draw a trained cell's samples with the cell's own seed, and write result.json last."""
    from benchmarks.demo_quality import training_seconds
    from gspn_dit.config import load_config

    run = directory / "run"
    pipeline, seed = load(run), load_config(run / "config.yaml").seed
    images, labels = draw(pipeline, data.samples, SETTING["steps"], SETTING["guidance_scale"], seed)
    save_samples(directory / SAMPLES, images)
    trained = training_seconds(run)
    figures = {
        **data.scores(images, labels, SETTING["reference"]),
        "training_seconds": trained["training_seconds"],
        "val_loss": trained["final_val_loss"],
        "setting": data.setting,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
    }
    write_atomically(directory / "result.json", json.dumps(figures, indent=2).encode())


def main() -> None:
    """Score one cell."""
    parser = ArgumentParser(prog="benchmarks.scoring", description=__doc__.split("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="of the cell; its run lies in DIR/run")
    add_data_options(parser, tuple(DATA_SETS), default=None)
    options = parser.parse_args()
    score_cell(options.directory, *chosen(options))


if __name__ == "__main__":
    run_cli(main)
