"""The report: JSON, Markdown, a self-contained HTML page and the sample grid, written completely or not at all."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fid.labelled import LabelledImages
from fid.page import markdown, page
from gspn_dit import environment
from gspn_dit.data.decoding import as_pixels
from gspn_dit.errors import UserError
from gspn_dit.files import cannot_hold
from gspn_dit.grid import class_grid, save_png, to_pil

FILES = ("report.json", "report.md", "index.html", "grid.png")
PACKAGES = ("torch", "torch-fidelity", "numpy", "datasets", "pillow", "scikit-learn")
GRID_COLUMNS = 10
GRID_CLASSES = 20
UNLABELLED_IMAGES = 100
TILE_SIZE = 128  # pixels: larger images are shown smaller


@dataclass(frozen=True)
class PublishedRow:
    """One line of a paper's table, all under the protocol adm-50k."""

    model: str
    parameters: str
    steps: str
    guidance_scale: float
    fid: float
    sfid: float
    inception_score: float
    precision: float
    recall: float


# Of 50,000 ImageNet 256×256 samples, from the tables of DiT (arXiv 2212.09748) and GSPN (2501.12381).
# None has been reproduced by this project yet.
PUBLISHED_ROWS = (
    PublishedRow("DiT-XL/2", "675M", "400K", 1.0, 20.05, 6.87, 64.74, 0.621, 0.609),
    PublishedRow("GSPN-B/2", "137M", "400K", 1.0, 28.70, 6.87, 50.12, 0.585, 0.609),
    PublishedRow("GSPN-L/2", "443M", "400K", 1.0, 17.25, 8.78, 77.37, 0.657, 0.417),
    PublishedRow("GSPN-XL/2", "690M", "400K", 1.0, 15.26, 6.51, 85.99, 0.670, 0.670),
    PublishedRow("DiT-XL/2", "675M", "7M", 1.5, 2.27, 4.60, 278.2, 0.83, 0.57),
)
PUBLISHED_PROTOCOL = "adm-50k"


def published_rows(guidance_scale: Any = None) -> list[PublishedRow]:
    """The rows with that guidance scale, or all where it is unknown or nobody published with it."""
    same = [row for row in PUBLISHED_ROWS if row.guidance_scale == guidance_scale]
    return same or list(PUBLISHED_ROWS)


def versions() -> dict[str, str]:
    """Versions of Python, this project and the packages that decide the scores."""
    return {name: version or "unknown" for name, version in environment.versions(PACKAGES).items()}


def prepare_directory(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a report directory that is not new or empty, unless `overwrite` and it holds nothing but a report."""
    target = Path(out)
    if problem := cannot_hold(target):
        raise UserError(f"--out {problem}")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target} is a file; give a directory")
    if not target.is_dir():
        return
    entries = sorted(entry.name for entry in target.iterdir())
    if entries and not overwrite:
        raise UserError(f"the directory {target} is not empty; give --overwrite to replace the report in it")
    foreign = [name for name in entries if name not in FILES]
    if foreign:
        raise UserError(
            f"the directory {target} holds something besides a report ({', '.join(foreign[:3])}); "
            "--overwrite replaces reports only, choose another directory"
        )


@contextmanager
def _replaced_directory(out: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its place when the block succeeds and vanishes when it fails."""
    target = Path(out).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    previous = target.with_name(f".{target.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        prepare_directory(target, overwrite)
        if target.exists():
            target.rename(previous)
        try:
            temporary.rename(target)
        except OSError:
            if previous.exists():
                previous.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)


def write_report(
    report: dict[str, Any],
    samples: LabelledImages,
    out: str | os.PathLike[str],
    overwrite: bool = False,
    class_names: Sequence[str] = (),
    reference: LabelledImages | None = None,
) -> None:
    """Write report.json, report.md, index.html and grid.png into `out`, all of them or nothing.

    Args:
        report: what `fid.opened.score` returned.
        samples: the images to show; `class_names` names their classes where they do not themselves.
        reference: the real images, of which those nearest to some samples are shown.
    """
    try:
        _write(report, samples, out, overwrite, samples.class_names or class_names, reference)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}") from None


def _write(
    report: dict[str, Any],
    samples: LabelledImages,
    out: str | os.PathLike[str],
    overwrite: bool,
    class_names: Sequence[str],
    reference: LabelledImages | None,
) -> None:
    shown, labels = _chosen(samples)
    grid = class_grid(shown, labels, class_names, columns=GRID_COLUMNS)
    neighbours = [] if reference is None else _neighbour_rows(report, samples, reference, class_names)
    with _replaced_directory(out, overwrite) as folder:
        save_png(grid, folder / "grid.png")
        text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        picture = base64.b64encode((folder / "grid.png").read_bytes()).decode()
        (folder / "index.html").write_text(page(report, picture, neighbours), encoding="utf-8")


def _chosen(samples: LabelledImages) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of the grid: the first of each class, or simply the first; large ones are made smaller."""
    labels = samples.labels
    if labels is None:
        return _smaller(samples.pixels[:UNLABELLED_IMAGES]), None
    firsts = [np.flatnonzero(labels == label)[:GRID_COLUMNS] for label in np.unique(labels)[:GRID_CLASSES]]
    kept = np.sort(np.concatenate(firsts))
    return _smaller(samples.pixels[kept]), labels[kept]


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """Images uint8 [n, H, W, C] no wider or higher than `TILE_SIZE`."""
    from PIL import Image

    longest = max(pixels.shape[1:3])
    if longest <= TILE_SIZE:
        return np.asarray(pixels)
    height, width = (max(1, round(side * TILE_SIZE / longest)) for side in pixels.shape[1:3])
    resized = [to_pil(image).resize((width, height), Image.Resampling.LANCZOS) for image in pixels]
    return np.stack([as_pixels(image) for image in resized])


def _neighbour_rows(
    report: dict[str, Any], samples: LabelledImages, reference: LabelledImages, class_names: Sequence[str]
) -> list[list[tuple[str, str]]]:
    """Rows of (caption, PNG in base64): a sample, then the real images nearest to it in feature space."""
    rows = []
    for entry in report["neighbours"]:
        label = entry["label"]
        name = f"sample {entry['sample']}"
        if label is not None:
            name += f": {class_names[label] if label < len(class_names) else label}"
        captions = [name, *(f"distance {distance:#.3g}" for distance in entry["distance"])]
        drawn = samples.pixels[np.array([entry["sample"]])]
        pixels = [drawn, reference.pixels[np.array(entry["nearest"])]]
        pictures = [_encoded(image) for part in pixels for image in _smaller(part)]
        rows.append(list(zip(captions, pictures, strict=True)))
    return rows


def _encoded(image: np.ndarray) -> str:
    """A PNG of one image [H, W, C] in base64."""
    buffer = io.BytesIO()
    class_grid(image[None]).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
