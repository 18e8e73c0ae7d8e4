"""What a model trained at one size draws at two and four times that size, unchanged: pictures, FD of crops, classes.

    python -m benchmarks.resolution --study benchmarks/results/quality_fashion{,_block}.json \\
        --picture docs/resolution.png --out benchmarks/results/resolution.json

The models are those that studies of `benchmarks.one_rate` trained with their first seed, all that a study of
`benchmarks.quality` scored on a data set at equal time and its largest budget (--fair), or those that --runs names.

A model without positions is given another grid, and nothing else changes. One with sine and cosine positions is drawn
twice: with positions that continue beyond the training grid, and with positions squeezed into its range; one that was
trained with the latter is drawn so alone. Every size is scored twice. Crops of the training size, as many at every size
and at places drawn once, are compared with the training images, or with crops of real images of the larger size
(--larger), where a picture has one thing in its middle: is it made of the right parts? Whole images, shrunk by
averaging k×k pixels, are classified by the feature extractor: does the picture show what was asked for? Images of the
validation split say how good either can get.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import one_rate
from benchmarks.output import publish
from benchmarks.scoring import DATA_SETS, SETTING, DataSet
from benchmarks.second_look import read_json, read_study, scored_cells
from gspn_dit.errors import ArgumentParser, UserError, run_cli

if TYPE_CHECKING:
    from fid.features import FeatureNet
    from gspn_dit.models.base import DiffusionModel

SCALES = (1, 2, 4)
PICTURED = 6
"""Images of each model and size in the picture, one per class."""
GREYS = 8
"""Levels in the picture, to keep its file small."""
REAL = "validation images"
REFERENCE = 10_000
"""Training images that crops are compared with, at most."""


@dataclass(frozen=True)
class Run:
    """A trained model."""

    model: str
    directory: str
    seed: int = 0
    """Of its training, and of the images that it draws."""


def crops(images: np.ndarray, size: int, count: int) -> np.ndarray:
    """Return crops [count, size, size, C] of images [n, H, W, C] in turn, at places drawn with a fixed seed."""
    limits = (images.shape[1] - size + 1, images.shape[2] - size + 1)
    places = np.random.default_rng(0).integers(0, limits, (count, 2))
    return np.stack([images[i % len(images), y : y + size, x : x + size] for i, (y, x) in enumerate(places)])


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Return images [n, k·size, k·size, C] averaged over k×k pixels, uint8 [n, size, size, C]."""
    count, height, _, channels = images.shape
    k = height // size
    means = images.reshape(count, size, k, size, k, channels).mean(axis=(2, 4))
    return np.floor(means + 0.5).astype(np.uint8)


def image_count(scale: int, samples: int, least: int) -> int:
    """Return how many images are drawn: the same number of pixels at every size, but no fewer images than the least."""
    return max(samples // scale**2, min(samples, least))


def labels_of(count: int, classes: int) -> np.ndarray:
    """Return what so many images are asked to show: all classes in turn, or some, evenly over the list of them."""
    return np.arange(count) * max(classes, count) // count % classes


def ways(name: str, model: DiffusionModel) -> list[tuple[str, bool]]:
    """Return the name of each way to draw larger images, and whether positions are interpolated."""
    if not model.has_positions or model.interpolate_positions:  # which it was trained for
        return [(name, model.interpolate_positions)]
    return [
        (f"{name}, positions {'interpolated' if squeezed else 'continued'}", squeezed) for squeezed in (False, True)
    ]


def larger_images(words: Sequence[str], data: DataSet, size: int) -> dict[int, DataSet]:
    """Return real images of larger sizes by scale, of words SCALE=DIR; raises UserError."""
    found: dict[int, DataSet] = {}
    for word in words:
        scale, _, directory = word.partition("=")
        if scale not in map(str, SCALES[1:]) or not directory:
            scales = ", ".join(map(str, SCALES[1:]))
            raise UserError(f"--larger is {word}, but takes SCALE=DIR, such as 2=data/emoji64_classes, of {scales}")
        if int(scale) in found:
            raise UserError(f"--larger names images of {scale} times the size twice; give each scale once")
        found[int(scale)] = dataclasses.replace(data.at(directory, None), image_size=int(scale) * size)
    return found


def draw_all(runs: Sequence[Run], size: int, options: Any) -> Iterator[tuple[Run, str, int, np.ndarray, np.ndarray]]:
    """Yield (run, name, scale, images, labels) of every model at every size."""
    from benchmarks.scoring import load

    for run in runs:
        pipeline = load(run.directory)
        found = ways(run.model, pipeline.model)
        for scale in options.scales:
            count = image_count(scale, options.samples, options.least)
            labels = labels_of(count, len(pipeline.class_names))
            images = None
            for name, pipeline.model.interpolate_positions in found:
                if scale > 1 or images is None:  # on the training grid all positions are the same
                    images = pipeline(
                        labels.tolist(),
                        num_inference_steps=options.steps,
                        guidance_scale=options.guidance_scale,
                        seed=run.seed,
                        height=scale * size,
                        width=scale * size,
                        output_type="np",
                    ).images
                    assert isinstance(images, np.ndarray)
                yield run, name, scale, images, labels


def figures(
    images: np.ndarray, labels: np.ndarray, size: int, samples: int, real: Any, net: FeatureNet
) -> dict[str, Any]:
    """Return the Fréchet distance of crops to real features, and how often the shrunk images show their class."""
    from fid.extraction import extract
    from fid.metrics import class_agreement, frechet_distance

    return {
        "images": len(images),
        "crop_fd": frechet_distance(extract(net, crops(images, size, samples)).features, real),
        "class_agreement": class_agreement(extract(net, shrunk(images, size)).logits, labels),
    }


def measure(runs: Sequence[Run], data: DataSet, options: Any) -> dict[str, Any]:
    """Draw every model at every size and score it."""
    from benchmarks.measure import CpuDevice, software
    from fid.extraction import extract
    from fid.features import load_feature_net

    net, size = load_feature_net(data.features), data.load("train").image_size
    real, table = {}, []
    for scale, source in {1: data, **larger_images(options.larger, data, size)}.items():
        training, validation = (source.load(split) for split in ("train", "validation"))
        rows = np.random.default_rng(0).permutation(len(training))[:REFERENCE]
        real[scale] = extract(net, crops(training.pixels(rows), size, len(rows))).features
        count = image_count(scale, options.samples, options.least)
        some = np.random.default_rng(0).permutation(len(validation))[:count]
        held_out = validation.pixels(some), validation.labels[some]
        found = figures(*held_out, size, options.samples, real[scale], net)
        table.append({"model": REAL, "seed": 0, "scale": scale, **found})
    pictures, last, found = {}, None, {}
    for run, name, scale, images, labels in draw_all(runs, size, options):
        if images is not last:  # on the training grid all ways to draw have the same
            pictures.setdefault(f"{name}, {scale}×", images[:PICTURED])
            found = figures(images, labels, size, options.samples, real.get(scale, real[1]), net)
        last = images
        table.append({"model": name, "seed": run.seed, "scale": scale, **found})
        print(table[-1], flush=True)
    if options.picture:
        save_picture(pictures, options.picture)
    return {
        "data": data.name,
        "size": size,
        "setting": setting_of(options),
        "rows": table,
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def setting_of(options: Any) -> dict[str, Any]:
    """Return how images are drawn and cut, as the result says it."""
    return {"crops": options.samples, "steps": options.steps, "guidance_scale": options.guidance_scale}


def beside(file: Path, options: Any) -> list[dict[str, Any]]:
    """Return the rows of an earlier result; raises UserError for one of other images."""
    found = read_json(file, "--beside")
    if not isinstance(found, dict) or (found.get("data"), found.get("setting")) != (options.data, setting_of(options)):
        raise UserError(f"--beside {file} is no result of benchmarks.resolution on {options.data} drawn in this way")
    return list(found["rows"])


def joined(earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return earlier rows by model, with new ones in place of those of the same models and sizes."""

    def drawn(row: dict[str, Any]) -> tuple[str, int]:
        return str(row["model"]).split(",")[0], row["scale"]  # a comma: with which positions

    place = {name: number for number, name in enumerate(dict.fromkeys(drawn(row)[0] for row in [*earlier, *rows]))}
    again = {drawn(row) for row in rows}
    kept = [row for row in earlier if drawn(row) not in again]
    return sorted([*kept, *rows], key=lambda row: (place[drawn(row)[0]], row["scale"]))


def save_picture(pictures: dict[str, np.ndarray], file: str) -> None:
    """Write a PNG with a row of images per model and size, all shown equally large."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, axes = pyplot.subplots(len(pictures), PICTURED, figsize=(PICTURED, 1.16 * len(pictures)), squeeze=False)
    for line, (name, images) in zip(axes, pictures.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        line[0].set_title(name, loc="left", fontsize=8, pad=3)
    figure.subplots_adjust(0, 0, 1, 0.985, wspace=0.05, hspace=0.2)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    Image.fromarray(pixels).convert("L").quantize(GREYS).save(file, optimize=True)
    pyplot.close(figure)


def runs_of_study(file: Path, work: Path) -> tuple[str, list[Run]]:
    """Return a study's data set, and the run of every variant with its first seed, for its first budget."""
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in study["cells"] if (row["seed"], row["budget"]) == (0, next(iter(study["budgets"])))]
        cells = [one_rate.Cell(study["data"], row["variant"], study["size"], row["seed"], row["steps"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read as a study of benchmarks.one_rate: {error}") from None
    return study["data"], [Run(cell.variant, str(cell.directory(work) / "run")) for cell in cells]


def runs_of_studies(files: list[Path], work: Path) -> tuple[str, list[Run]]:
    """Return the data set of several studies, and all their runs as `runs_of_study` does."""
    studies = [runs_of_study(file, work) for file in files]
    data = list(dict.fromkeys(name for name, _ in studies))
    if len(data) > 1:
        raise UserError(f"--study takes results of one data set, but these are of {', '.join(data)}")
    return data[0], [run for _, found in studies for run in found]


def runs_of_fair_study(file: Path, data: DataSet, work: Path) -> list[Run]:
    """Return what a study of `benchmarks.quality` scored on a data set at equal time and its largest budget."""
    study = read_study(file)
    kinds = scored_cells(study, data)
    cells = next(found for kind, found in kinds.items() if kind.endswith("equal time"))
    size = study["protocol"]["size"]
    return [Run(cell.contender, str(cell.directory(work, size) / "run"), cell.seed) for cell in cells]


def named_runs(words: Sequence[str]) -> list[Run]:
    """Return the runs of words NAME=DIR, of which those of one name are of seeds 0, 1, …; raises UserError."""
    found: list[Run] = []
    for word in words:
        name, _, directory = word.partition("=")
        if not directory:
            raise UserError("--runs takes NAME=DIR, such as gspn=runs/demo")
        found.append(Run(name, directory, sum(run.model == name for run in found)))
    return found


def main() -> None:
    """Measure and write the JSON and the picture."""
    parser = ArgumentParser(prog="benchmarks.resolution", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--study", metavar="FILE", nargs="+", help="results of benchmarks.one_rate, whose runs are there"
    )
    source.add_argument("--fair", metavar="FILE", help="result of benchmarks.quality, whose runs on --data are there")
    source.add_argument("--runs", nargs="+", metavar="NAME=DIR", help="trained runs, of images of --data")
    parser.add_argument("--data", choices=tuple(DATA_SETS), default="digits", help="of --runs and --fair")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="draw these alone; default: all that are there")
    parser.add_argument("--scales", nargs="+", type=int, choices=SCALES, default=list(SCALES), help="draw at these")
    parser.add_argument("--beside", type=Path, metavar="JSON", help="an earlier result, of which other models and "
                        "sizes stay")  # fmt: skip
    parser.add_argument("--root", help="where the images lie, if not where docs/quality.md makes them")
    parser.add_argument("--features", help="feature extractor that tells their classes apart")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where the study's cells live")
    parser.add_argument("--larger", nargs="+", default=[], metavar="SCALE=DIR", help="real images of a larger size, "
                        "which crops are compared with there")  # fmt: skip
    parser.add_argument("--samples", type=int, default=256, help="crops at each size, and images of the training size")
    parser.add_argument("--least", type=int, default=64, help="images of a larger size, at least")
    parser.add_argument("--steps", type=int, default=12, help="of the sampler")
    parser.add_argument("--guidance-scale", type=float, default=SETTING["guidance_scale"])
    parser.add_argument("--picture", help="write this PNG")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    if options.study:
        options.data, runs = runs_of_studies([Path(file) for file in options.study], options.work)
    data = DATA_SETS[options.data].at(options.root, options.features)
    if options.fair:
        runs = runs_of_fair_study(Path(options.fair), data, options.work)
    elif options.runs:
        runs = named_runs(options.runs)
    there = sorted({run.model for run in runs})
    chosen = options.models or there
    if unknown := sorted({*chosen} - {*there}):
        raise UserError(f"--models names {unknown[0]}, but there are {', '.join(there)}")
    runs = [run for run in runs if run.model in chosen]
    earlier = [] if options.beside is None else beside(options.beside, options)
    found = measure(runs, data, options)
    publish({**found, "rows": joined(earlier, found["rows"])}, options.out)


if __name__ == "__main__":
    run_cli(main)
