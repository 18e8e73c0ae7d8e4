"""The report: JSON, Markdown, a self-contained HTML page and the sample grid, written completely or not at all."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fid.images import LabelledImages, interleave
from gspn_dit.errors import UserError
from gspn_dit.grid import class_grid, save_png

FILES = ("report.json", "report.md", "index.html", "grid.png")
PACKAGES = ("torch", "torch-fidelity", "numpy", "datasets", "pillow", "scikit-learn")
GRID_COLUMNS = 10
GRID_CLASSES = 20
UNLABELLED_IMAGES = 100
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; image-rendering: pixelated; }
td { overflow-wrap: anywhere; }
"""


def versions() -> dict[str, str]:
    """Versions of Python, this project and the packages that decide the scores."""
    from gspn_dit import __version__

    found = {"python": platform.python_version(), "gspn-dit": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def prepare_directory(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a report directory that is not new or empty, unless `overwrite` and it holds nothing but a report."""
    target = Path(out)
    parent = next(folder for folder in target.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {target} cannot be created: {parent} is not a directory that can be written")
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
) -> None:
    """Write report.json, report.md, index.html and grid.png into `out`, all of them or nothing.

    Args:
        report: what `fid.evaluation.score` returned.
        samples: the images to show; `class_names` names their classes where they do not themselves.
    """
    try:
        _write(report, samples, out, overwrite, class_names)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}") from None


def _write(
    report: dict[str, Any],
    samples: LabelledImages,
    out: str | os.PathLike[str],
    overwrite: bool,
    class_names: Sequence[str],
) -> None:
    shown, labels = _chosen(samples)
    grid = class_grid(shown, labels, samples.class_names or class_names, columns=GRID_COLUMNS)
    with _replaced_directory(out, overwrite) as folder:
        save_png(grid, folder / "grid.png")
        text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        picture = base64.b64encode((folder / "grid.png").read_bytes()).decode()
        (folder / "index.html").write_text(page(report, picture), encoding="utf-8")


def _chosen(samples: LabelledImages) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of the grid: the first of each class, or simply the first."""
    if samples.labels is None:
        return samples.pixels[:UNLABELLED_IMAGES], None
    classes = np.unique(samples.labels)[:GRID_CLASSES]
    order = interleave(samples.labels, len(samples))
    kept = order[np.isin(samples.labels[order], classes)]
    return samples.pixels[kept], samples.labels[kept]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{value['mean']:.4g} ± {value['std']:.2g}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def score_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (name, samples, real held-out images) of the table of scores; the first one is the heading."""
    scores, own, comparison = report["scores"], report["held_out"], report["comparison"]
    titles = {
        "class_agreement": "class agreement",
        "nearest_distance": "median distance to nearest reference image",
        "n": "images",
    }
    rows: list[tuple[str, ...]] = [("score", "samples", *(("real, held out",) if own else ()))]
    for key, value in scores.items():
        real = (_number(own[key]),) if own else ()
        rows.append((titles.get(key, key), _number(value), *real))
    if comparison is not None:
        at = f"at n = {comparison['n']}"
        for key, title in (("fd", report["names"]["fd"]), ("recall", "recall")):
            cells = _number(comparison[f"{key}_samples"]), _number(comparison[f"{key}_held_out"])
            rows.append((f"{title} {at}", *cells))
    return rows


def ratio_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value) of the ratios of samples to held-out real images; none without the latter."""
    comparison = report["comparison"]
    if comparison is None:
        return []
    return [
        (
            f"{report['names']['fd']}, samples / real, at n = {comparison['n']}",
            _number(comparison["fd_ratio_at_equal_n"]),
        ),
        ("nearest distance, samples / real", _number(comparison["nearest_distance_ratio"])),
    ]


def setting_rows(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every setting as (dotted name, value)."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += setting_rows(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "–" if value is None else str(value)))
    return rows


def _tables(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    tables: list[tuple[str, list[tuple[str, ...]]]] = [("Scores", score_rows(report))]
    if ratios := ratio_rows(report):
        tables.append(("Samples against real images", [("ratio", "value"), *ratios]))
    tables.append(("Settings", [("setting", "value"), *setting_rows(report["settings"])]))
    return tables


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, with the grid as an image beside it."""
    lines = [f"# {report['names']['fd']} report", "", "![samples by class](grid.png)", ""]
    for title, rows in _tables(report):
        heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines += [f"## {title}", "", f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in body]
        lines.append("")
    lines += ["## Notes", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any], picture: str) -> str:
    """The report as one HTML page with style and image inside; `picture` is the grid's PNG in base64."""
    title = html.escape(f"{report['names']['fd']} report")
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f'<img alt="samples by class" src="data:image/png;base64,{picture}">',
    ]
    for name, rows in _tables(report):
        heading, *body = [[html.escape(cell) for cell in row] for row in rows]
        parts.append(f"<h2>{name}</h2>\n<table>\n<tr>" + "".join(f"<th>{cell}</th>" for cell in heading) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
        parts.append("</table>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"])
    parts.append(f"<h2>Notes</h2>\n<ul>{notes}</ul>\n</body>\n</html>\n")
    return "\n".join(parts)
