"""Curves of metrics.jsonl as SVG: what is read, how it is thinned, and axes that people can read."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_POINTS = 400
"""Points of a curve; longer ones are averaged in as many intervals of steps."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 58, 30, 24, 26
CHARACTER = 7
"""Pixels that a digit takes, at most."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
BEHIND = "#b4b4b4"
"""Light grey on white and on black."""
PREFIXES = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}

Curve = list[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #767676; }
@media (prefers-color-scheme: dark) { :root { --soft: #a0a0a0; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 98rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .2rem; }
p { color: var(--soft); margin: .2rem 0 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; min-width: 0; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
.key > span { display: inline-block; }
svg .grid { stroke: var(--line); } svg path { fill: none; stroke-width: 1.6; }
figure { margin: 0; } figure img { max-width: 100%; } figcaption, .key { color: var(--soft); font-size: .8rem; }
.wide { grid-column: 1 / -1; } .grids { display: flex; flex-wrap: wrap; gap: 1rem; }
pre { overflow: auto; }
"""


@dataclass(frozen=True)
class Axis:
    """How values are shown: in which unit, and whether a wide range may get a logarithmic axis."""

    unit: str = ""
    scaled: bool = False
    """Whether the unit takes a prefix (GB), as the largest value asks for."""
    linear: bool = False
    """From zero, and never logarithmic."""

    def fit(self, largest: float) -> tuple[float, str]:
        """Return what values are divided by, and the unit with its prefix.

        >>> Axis("B", scaled=True).fit(1.04e9)
        (1000000000.0, 'GB')
        """
        factor = next((factor for factor in PREFIXES if self.scaled and abs(largest) >= factor), 1.0)
        return factor, PREFIXES.get(factor, "") + self.unit


PLAIN = Axis()


@dataclass(frozen=True)
class Backdrop:
    """Curves that are drawn in grey behind others, to compare with."""

    title: str
    """What the key calls all of them."""
    curves: Mapping[str, Curve]
    """By the names of those they lie behind."""


def read_metrics(path: Path) -> dict[str, Curve]:
    """Return (step, value) of every number in metrics.jsonl by key; what is null or half-written is left out."""
    curves: dict[str, Curve] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves[key].append((step, value))
    return curves


def thin(curve: Curve, points: int = MAX_POINTS) -> Curve:
    """Average a long curve in intervals of equal length.

    >>> thin([(1, 2.0), (2, 4.0), (3, 6.0), (4, 8.0)], 2)
    [(1.5, 3.0), (3.5, 7.0)]
    """
    if len(curve) <= points:
        return curve
    edges = [len(curve) * number // points for number in range(points + 1)]
    parts = (curve[low:high] for low, high in itertools.pairwise(edges))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float) -> list[float]:
    """Return two to six round numbers from `low` to `high`.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        return [low]
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    stride = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough * 0.999)
    first = math.ceil(low / stride - 1e-9)
    return [round(stride * n, 12) + 0.0 for n in range(first, math.floor(high / stride + 1e-9) + 1)]


def number_text(value: float) -> str:
    """Return a number for people: three digits that count, and all of those before the point up to a million.

    >>> [number_text(value) for value in (0.42496, 1234.5, 2e6, 1.234e-5)]
    ['0.425', '1,234', '2e+06', '1.23e-05']
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _decade_text(value: float) -> str:
    """Return a label of a logarithmic axis, which has room for seven characters."""
    return number_text(value) if 1e-4 <= value < 1e6 else f"{value:.2g}"


def tick_texts(values: Sequence[float]) -> list[str]:
    """Return labels of ticks, with as many digits as tell them apart and no more.

    >>> tick_texts([0.424, 0.426]), tick_texts([0.0, 5000.0]), tick_texts([0.0, 2e-5])
    (['0.424', '0.426'], ['0', '5,000'], ['0', '2e-05'])
    """
    stride = values[1] - values[0] if len(values) > 1 else abs(values[0])
    places = max(0, -math.floor(math.log10(stride) + 1e-9)) if stride > 0 else 0
    if places > 4 or max(map(abs, values)) >= 1e6:
        return [f"{value:.4g}" for value in values]
    return [f"{value:,.{places}f}" for value in values]


@dataclass(frozen=True)
class _Frame:
    """Where steps and values lie in a picture: the ranges that its curves span, and how values are shown."""

    first: float
    last: float
    """Of the steps."""
    low: float
    high: float
    """Of the values, divided by `factor`; of their logarithms on a logarithmic axis."""
    factor: float
    unit: str
    logarithmic: bool

    @classmethod
    def around(cls, curves: Sequence[Curve], axis: Axis) -> _Frame:
        """Return the frame that curves fill."""
        xs, ys = (values for values in zip(*(point for curve in curves for point in curve)))
        factor, unit = axis.fit(max(map(abs, ys)))
        logarithmic = not axis.linear and min(ys) > 0 and max(ys) > 30 * min(ys)
        scaled = math.log10 if logarithmic else float
        low, high = scaled(min(ys) / factor), scaled(max(ys) / factor)
        low = min(low, 0.0) if axis.linear else low
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        last = max(xs) if max(xs) > min(xs) else min(xs) + 1
        return cls(min(xs), last, low, high, factor, unit, logarithmic)

    def across(self, x: float) -> float:
        """Return the pixel of a step, from the left."""
        return LEFT + (x - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def down(self, scaled: float) -> float:
        """Return the pixel, from the top, of a value that is divided, and a logarithm on a logarithmic axis."""
        return TOP + (self.high - scaled) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a point of a curve."""
        return self.across(x), self.down(math.log10(y / self.factor) if self.logarithmic else y / self.factor)

    def text(self, y: float) -> str:
        """Return a value for people, with its unit."""
        return f"{number_text(y / self.factor)} {self.unit}".rstrip()

    def axes(self, x_title: str) -> list[str]:
        """Draw grid and labels."""
        parts, margin = [], f'x="{LEFT - 6}"'
        if self.unit:
            parts.append(f'<text class="unit" {margin} y="11" text-anchor="end">{html.escape(self.unit)}</text>')
        marks = ticks(self.low, self.high)
        labels = [_decade_text(10**tick) for tick in marks] if self.logarithmic else tick_texts(marks)
        for tick, label in zip(marks, labels, strict=True):
            y = self.down(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text {margin} y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        below = ticks(self.first, self.last)
        texts = tick_texts(below)
        for tick, label in zip(below, texts, strict=True):
            parts.append(f'<text x="{self.across(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
        free = min(LEFT, self.across(below[0]) - CHARACTER / 2 * len(texts[0])) - 6  # before the first label
        parts.append(f'<text x="{free:.1f}" y="{HEIGHT - 8}" text-anchor="end">{html.escape(x_title)}</text>')
        return parts

    def line(self, name: str, curve: Curve, colour: str, x_title: str) -> list[str]:
        """Draw a curve, with a dot at its end and its last value as a tip."""
        points = [self.place(x, y) for x, y in thin(curve)]
        path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        tip = html.escape(f"{name}: {self.text(curve[-1][1])} at {x_title} {curve[-1][0]:g}")
        return [
            f'<path d="{path}" stroke="{colour}" data-name="{html.escape(name)}"><title>{tip}</title></path>',
            f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5" fill="{colour}"/>',
        ]


def chart(
    curves: Mapping[str, Curve], x_title: str = "step", axis: Axis = PLAIN, behind: Backdrop | None = None
) -> str:
    """Draw curves over a shared axis, of steps, say, as SVG.

    Positive values that span much get a logarithmic axis unless it is to be linear.
    """
    grey = behind.curves if behind else {}
    frame = _Frame.around([thin(curve) for curve in (*curves.values(), *grey.values())], axis)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', *frame.axes(x_title)]
    for name, curve in grey.items():
        parts += frame.line(f"{behind.title}: {name}" if behind else name, curve, BEHIND, x_title)
    for colour, (name, curve) in zip(COLOURS * len(curves), curves.items()):
        parts += frame.line(name, curve, colour, x_title)
    return "".join(parts) + "</svg>"


def panel(title: str, curves: Mapping[str, Curve], axis: Axis = PLAIN, behind: Backdrop | None = None) -> str:
    """Return a section of a page: a heading, the curves, and a key with their last values."""
    factor, unit = axis.fit(max(abs(y) for curve in curves.values() for _, y in curve))
    entries = [
        f'<span><span style="color:{colour}">●</span> {html.escape(name)} '
        f"<b>{f'{number_text(curve[-1][1] / factor)} {unit}'.rstrip()}</b></span>"
        for colour, (name, curve) in zip(COLOURS * len(curves), curves.items())
    ]
    if behind:
        entries.append(f'<span><span style="color:{BEHIND}">●</span> {html.escape(behind.title)}</span>')
    drawn = chart(curves, axis=axis, behind=behind)
    return f'<section><h2>{html.escape(title)}</h2>{drawn}<div class="key">{" · ".join(entries)}</div></section>'


def document(title: str, body: str, head: str = "", style: str = "") -> str:
    """Return a page of HTML that needs nothing but itself; title is escaped, the rest is HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{head}'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )
