"""What the report shows: its tables, as Markdown and as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; image-rendering: pixelated; }
td.long { overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 .8rem .8rem 0; }
figcaption { font-size: .8rem; }
"""
LONG = 40  # characters
LONGEST = 300  # characters of a setting, such as a thousand class names
PUBLISHED_SCORES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
}


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{value['mean']:.4g} ± {value['std']:.2g}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def score_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (name, samples, real held-out images) of the table of scores; the first one is the heading."""
    scores, own, comparison = report["scores"], report["held_out"], report["comparison"]
    titles = {**report["titles"], "n": "images"}
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
            text = "–" if value is None else str(value)
            rows.append((f"{prefix}{key}", text if len(text) <= LONGEST else f"{text[:LONGEST]}… (see report.json)"))
    return rows


def interval_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (name, low, high, method) of the 95 % intervals of the samples' scores."""
    return [
        (name, _number(found["low"]), _number(found["high"]), found["method"])
        for name, found in report["intervals"].items()
    ]


def published_table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The samples, real images and published rows under one heading; none where the protocol does not compare."""
    if not report["published"]:
        return []
    scores, own = report["scores"], report["held_out"]
    stated = report["settings"]["generation"] or {}
    columns = list(PUBLISHED_SCORES.values())
    rows: list[tuple[str, ...]] = [("model", "parameters", "training steps", "guidance", *columns)]
    facts = str(stated.get("step", "–")), str(stated.get("guidance_scale", "–"))
    rows.append(("these samples", "–", *facts, *(_number(scores.get(name)) for name in columns)))
    if own is not None:
        rows.append(("real images", "–", "–", "–", *(_number(own.get(name)) for name in columns)))
    for row in report["published"]:
        known = row["parameters"], row["steps"], _number(row["guidance_scale"])
        rows.append((f"{row['model']}, published", *known, *(_number(row[key]) for key in PUBLISHED_SCORES)))
    return rows


def _tables(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    tables: list[tuple[str, list[tuple[str, ...]]]] = [("Scores", score_rows(report))]
    if ratios := ratio_rows(report):
        tables.append(("Samples against real images", [("ratio", "value"), *ratios]))
    if intervals := interval_rows(report):
        tables.append(("95 % intervals", [("score", "low", "high", "method"), *intervals]))
    if published := published_table(report):
        tables.append(("Published figures", published))
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


def page(report: dict[str, Any], picture: str, neighbours: Sequence[Sequence[tuple[str, str]]] = ()) -> str:
    """The report as one HTML page with style and images inside.

    Args:
        report: what `fid.evaluation.score` returned.
        picture: the grid's PNG in base64.
        neighbours: rows of (caption, PNG in base64), a sample first and then the real images nearest to it.
    """
    title = html.escape(f"{report['names']['fd']} report")
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f'<img alt="samples by class" src="data:image/png;base64,{picture}">',
    ]
    *scores, settings = (_table(name, rows) for name, rows in _tables(report))
    parts += scores
    if neighbours:
        parts.append("<h2>Nearest real images in feature space</h2>")
    for row in neighbours:
        figures = (_figure(caption, encoded) for caption, encoded in row)
        parts.append(f"<div>{''.join(figures)}</div>")
    parts.append(settings)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"])
    parts.append(f"<h2>Notes</h2>\n<ul>{notes}</ul>\n</body>\n</html>\n")
    return "\n".join(parts)


def _table(name: str, rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table whose first row is its own; cells too long for a line may be broken anywhere."""
    heading, *body = rows
    parts = [f"<h2>{html.escape(name)}</h2>\n<table>"]
    parts.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in heading) + "</tr>")
    for row in body:
        cells = (f"<td{' class=long' * (len(cell) > LONG)}>{html.escape(cell)}</td>" for cell in row)
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*parts, "</table>"])


def _figure(caption: str, encoded: str) -> str:
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
