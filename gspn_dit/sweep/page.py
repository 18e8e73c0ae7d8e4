"""A sweep's page: what was chosen and what it cost, curves of every round, and a table of all that was tried."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gspn_dit.training.charts import COLOURS, chart, document

PAGE = "index.html"
TABLE = """
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } tr.chosen { font-weight: bold; } a { color: inherit; }
"""


def rest_of(candidate: Mapping[str, Any]) -> str:
    """Return a candidate's settings but for its guidance scale, in a few words."""
    low, high = candidate["guidance_interval"]
    words = [f"t in [{low:g}, {high:g}]"]
    words += [] if candidate["ema"] is None else [f"EMA {candidate['ema']:g}"]
    words += [] if candidate["sampling_shift"] is None else [f"shift {candidate['sampling_shift']:g}"]
    return ", ".join(words)


def curves(candidates: Sequence[Mapping[str, Any]], number: int) -> dict[str, list[tuple[float, float]]]:
    """Return (guidance scale, score) of a round's candidates, a curve for each of the other settings.

    Without guidance an interval says nothing: such a candidate begins the curves of all intervals.
    """
    there = [one for one in candidates if len(one["scores"]) > number and one["scores"][number] is not None]

    def other(one: Mapping[str, Any]) -> tuple[Any, Any]:
        return one["ema"], one["sampling_shift"]

    found: dict[str, list[tuple[float, float]]] = {}
    for one in there:
        if one["guidance_scale"] != 1:
            found.setdefault(rest_of(one), [])
    for one in there:
        point = one["guidance_scale"], one["scores"][number]
        alike = {rest_of(two) for two in there if other(two) == other(one) and two["guidance_scale"] != 1}
        for name in alike if one["guidance_scale"] == 1 and alike else {rest_of(one)}:
            found.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(heading: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for kind, row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _choice(sweep: Mapping[str, Any]) -> str:
    name, images = sweep["score_name"], sweep["num_images"]
    heading = ("", "guidance", "other settings", f"{name} of {images:,}", f"of {images:,} fresh ones")
    rows = []
    for title in ("chosen", "default"):
        found = sweep[title]
        one = sweep["tried"][found["number"]]
        scores = _figure(found["score"]), _figure(found["fresh_score"])
        rows.append((title, (title, f"{one['guidance_scale']:g}", rest_of(one), *scores)))
    return _table(heading, rows)


def _tried(sweep: Mapping[str, Any]) -> str:
    """Return the table of all that was tried, the best of the last round first."""
    rounds, results = sweep["rounds"], sweep["results"]

    def place(number: int) -> tuple[int, float, int]:
        scores = results[number]["scores"]
        return -len(scores), float("inf") if scores[-1] is None else scores[-1], number

    rows = []
    for number in sorted(range(len(results)), key=place):
        one, scores, interval = sweep["tried"][number], results[number]["scores"], results[number]["interval"]
        cells = [_figure(score) for score in scores] + [""] * (len(rounds) - len(scores))
        bounds = f"[{interval['low']:.4g}, {interval['high']:.4g}]" if interval else ""
        kind = "chosen" if number == sweep["chosen"]["number"] else ""
        rows.append((kind, (f"{one['guidance_scale']:g}", rest_of(one), *cells, bounds)))
    heading = ("guidance", "other settings", *(f"{rung['images']:,} images" for rung in rounds), "95 % interval")
    return _table(heading, rows)


def page(sweep: Mapping[str, Any]) -> str:
    """Return the page of a finished sweep, one file that needs nothing else.

    Args:
        sweep: the content of sweep.json.
    """
    name, budget, reference = sweep["score_name"], sweep["budget"], sweep["reference"]
    candidates = [{**one, **result} for one, result in zip(sweep["tried"], sweep["results"], strict=True)]
    panels = []
    for number, rung in enumerate(sweep["rounds"]):
        found = curves(candidates, number)
        key = " · ".join(
            f'<span style="color:{colour}">●</span> {html.escape(text)}'
            for colour, text in zip(itertools.cycle(COLOURS), found)
        )
        title = f"Round {number + 1}: {name} by guidance scale, {rung['images']:,} images"
        drawn = chart(found, "guidance") if found else ""
        panels.append(f'<section><h2>{html.escape(title)}</h2>{drawn}<div class="key">{key}</div></section>')
    facts = (
        f"{sweep['checkpoint']}, step {sweep['step']:,} · {sweep['sampler']}, {sweep['num_inference_steps']} steps, "
        f"seed {sweep['seed']} · against {reference['source']}, {reference['n']:,} images · {budget['images']:,} "
        f"images drawn, {budget['share']:.0%} of the full grid's {budget['images_of_full_grid']:,}"
    )
    warning = (
        f"The chosen setting has the lowest {name} of those tried, so its score of the same images flatters it; that "
        "of fresh images does not. Scores of different numbers of images do not compare."
    )
    title = f"Sweep by {name}"
    body = (
        f"<h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p><main>"
        f'<section class="wide"><h2>Choice</h2>{_choice(sweep)}<p>{html.escape(warning)}</p></section>{"".join(panels)}'
        f'<section class="wide"><h2>All that was tried</h2>{_tried(sweep)}</section></main>'
    )
    return document(title, body, style=TABLE)
