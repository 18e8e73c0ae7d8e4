"""What the report shows: its tables, as Markdown and as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --soft: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; image-rendering: pixelated; }
td.long { overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 .8rem .8rem 0; min-width: 7rem; }
figcaption, .methods { font-size: .8rem; color: var(--soft); }
summary { font-size: 1.5em; font-weight: bold; cursor: pointer; margin: .83em 0; }
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


PUBLISHED_DIGITS = 4  # of a score beside those of papers; three elsewhere


def _number(value: Any, digits: int = 3) -> str:
    """A value for people, rounded to so many digits that count.

    >>> [_number(value) for value in (0.26061, 9.8, 100.44, 1234.5, 1000, None)]
    ['0.261', '9.80', '100', '1,234', '1,000', '–']
    """
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{_number(value['mean'], digits)} ± {value['std']:.2g}"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def score_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (name, samples, real held-out images) of the table of scores; the first one is the heading.

    A score of the samples has its 95 % interval beside it, where it has one.
    """
    scores, own, comparison = report["scores"], report["held_out"], report["comparison"]
    titles = {**report["titles"], "n": "images"}
    rows: list[tuple[str, ...]] = [("score", "samples", *(("real, held out",) if own else ()))]
    for key, value in scores.items():
        real = (_number(own[key]),) if own else ()
        rows.append((titles.get(key, key), _with_interval(value, report["intervals"].get(key)), *real))
    if comparison is not None:
        at = f"at n = {comparison['n']}"
        for key, title in (("fd", report["names"]["fd"]), ("recall", "recall")):
            cells = _number(comparison[f"{key}_samples"]), _number(comparison[f"{key}_held_out"])
            rows.append((f"{title} {at}", *cells))
    return rows


def _with_interval(value: Any, interval: dict[str, Any] | None) -> str:
    """A score with its interval in place of the spread over splits that it may have."""
    if interval is None:
        return _number(value)
    mean = value["mean"] if isinstance(value, dict) else value
    return f"{_number(mean)} [{_number(interval['low'])}, {_number(interval['high'])}]"


def interval_methods(report: dict[str, Any]) -> str:
    """A sentence on how the intervals in brackets come about; empty where there are none."""
    by_method: dict[str, list[str]] = {}
    for key, found in report["intervals"].items():
        by_method.setdefault(found["method"], []).append(report["titles"].get(key, key))
    methods = "; ".join(f"{', '.join(names)}: {method}" for method, names in by_method.items())
    return f"In brackets: 95 % intervals ({methods})." if methods else ""


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


def published_table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The samples, real images and published rows under one heading; none where the protocol does not compare."""
    if not report["published"]:
        return []
    scores, own = report["scores"], report["held_out"]
    stated = report["settings"]["generation"] or {}
    columns = list(PUBLISHED_SCORES.values())
    rows: list[tuple[str, ...]] = [("model", "parameters", "training steps", "guidance", *columns)]
    facts = str(stated.get("step", "–")), str(stated.get("guidance_scale", "–"))
    rows.append(("these samples", "–", *facts, *(_number(scores.get(name), PUBLISHED_DIGITS) for name in columns)))
    if own is not None:
        rows.append(("real images", "–", "–", "–", *(_number(own.get(name), PUBLISHED_DIGITS) for name in columns)))
    for row in report["published"]:  # whose digits are the papers'
        known = row["parameters"], row["steps"], f"{row['guidance_scale']:g}"
        rows.append((f"{row['model']}, published", *known, *(f"{row[key]:g}" for key in PUBLISHED_SCORES)))
    return rows


def _tables(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    tables: list[tuple[str, list[tuple[str, ...]]]] = [("Scores", score_rows(report))]
    if ratios := ratio_rows(report):
        tables.append(("Samples against real images", [("ratio", "value"), *ratios]))
    if published := published_table(report):
        tables.append(("Published figures", published))
    return tables


def _settings(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [("setting", "value"), *setting_rows(report["settings"])]


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, with the grid as an image beside it."""
    lines = [f"# {report['names']['fd']} report", "", "![samples by class](grid.png)", ""]
    for title, rows in [*_tables(report), ("Settings", _settings(report))]:
        heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines += [f"## {title}", "", f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in body]
        lines += ["", *([interval_methods(report), ""] if title == "Scores" and report["intervals"] else [])]
    lines += ["## Notes", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any], picture: str, neighbours: Sequence[Sequence[tuple[str, str]]] = ()) -> str:
    """The report as one HTML page with style and images inside.

    Args:
        report: what `fid.opened.score` returned.
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
    for name, rows in _tables(report):
        parts.append(f"<h2>{html.escape(name)}</h2>\n{_table(rows)}")
        if name == "Scores" and report["intervals"]:
            parts.append(f'<p class="methods">{html.escape(interval_methods(report))}</p>')
    if neighbours:
        parts.append("<h2>Nearest real images in feature space</h2>")
    for row in neighbours:
        figures = (_figure(caption, encoded) for caption, encoded in row)
        parts.append(f"<div>{''.join(figures)}</div>")
    parts.append(f"<details>\n<summary>Settings</summary>\n{_table(_settings(report))}\n</details>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"])
    parts.append(f"<h2>Notes</h2>\n<ul>{notes}</ul>\n</body>\n</html>\n")
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its heading; cells too long for a line may be broken anywhere."""
    heading, *body = rows
    parts = ["<table>"]
    parts.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in heading) + "</tr>")
    for row in body:
        cells = (f"<td{' class=long' * (len(cell) > LONG)}>{html.escape(cell)}</td>" for cell in row)
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*parts, "</table>"])


def _figure(caption: str, encoded: str) -> str:
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
