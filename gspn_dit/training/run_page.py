"""A page to watch a run by: curves and sample grids in one file that needs no server, no script and no network.

    python -m gspn_dit.training.run_page RUN

writes RUN/index.html from metrics.jsonl, config.yaml and samples/; training does so by itself whenever it validates,
samples or saves.
"""

from __future__ import annotations

import base64
import datetime
import html
import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from gspn_dit.data.images import evenly_spaced
from gspn_dit.files import write_atomically

PAGE = "index.html"
REFRESH_SECONDS = 30
MAX_POINTS = 400
"""Points of a curve; longer ones are averaged in as many intervals of steps."""
MAX_GRIDS = 9
MAX_PICTURE_BYTES = 300_000
MAX_PICTURE_PIXELS = 1_200
"""Height and width to which larger grids are reduced."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 240, 58, 30, 14, 26

VALIDATION = "Validation loss by time t"
QUARTILES = {
    "val_loss": "all times",
    "val_loss_q1": "t < ¼ (nearly clean)",
    "val_loss_q2": "¼ to ½",
    "val_loss_q3": "½ to ¾",
    "val_loss_q4": "t ≥ ¾ (nearly noise)",
}
PANELS = {
    "Training loss": {"loss": "loss"},
    VALIDATION: QUARTILES,
    "Validation accuracy": {"val_top1": "top-1", "val_top5": "top-5"},
    "Learning rate": {"learning_rate": "learning rate"},
    "Gradient norm before clipping": {"grad_norm": "gradient norm"},
    "Images per second": {"images_per_second": "images/s"},
    "Model FLOP per second": {"model_flops_per_second": "FLOP/s"},
    "Peak memory in bytes": {"peak_memory_bytes": "bytes"},
    "Quick FD (comparable within this run alone)": {"quick_fd": "FD"},
    "Skipped non-finite steps": {"nonfinite_steps": "steps"},
    "Skipped steps of an exploded loss": {"spikes": "steps"},
}
CONSTANTS = ("quick_fd_samples",)
"""Numbers that say how others were measured, and need no curve."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed")

Curve = list[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 98rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .2rem; }
p { color: var(--soft); margin: .2rem 0 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1rem; }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
svg .grid { stroke: var(--line); } svg path { fill: none; stroke-width: 1.6; }
figure { margin: 0; } figure img { max-width: 100%; } figcaption, .key { color: var(--soft); font-size: .8rem; }
.wide { grid-column: 1 / -1; } .grids { display: flex; flex-wrap: wrap; gap: 1rem; }
pre { overflow: auto; }
"""


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


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def chart(curves: Mapping[str, Curve], axis: str = "step") -> str:
    """Draw curves over a shared axis, of steps, say, as SVG; positive values that span much get a logarithmic axis."""
    thinned = {name: thin(curve) for name, curve in curves.items()}
    xs, ys = (values for values in zip(*(point for curve in thinned.values() for point in curve)))
    logarithmic = min(ys) > 0 and max(ys) > 30 * min(ys)
    scaled = math.log10 if logarithmic else float
    low, high = scaled(min(ys)), scaled(max(ys))
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    first, last = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return right, TOP + (high - scaled(y)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in ticks(low, high):
        value = 10**tick if logarithmic else tick
        y = place(first, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for tick in ticks(first, last):
        x = place(tick, 10**low if logarithmic else low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(tick)}</text>')
    for colour, (name, curve) in zip(COLOURS * len(curves), curves.items()):
        points = [place(x, y) for x, y in thinned[name]]
        path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        label = f"<title>{html.escape(name)}: {_number(curve[-1][1])} at {axis} {curve[-1][0]:g}</title>"
        parts.append(f'<path d="{path}" stroke="{colour}" data-name="{html.escape(name)}">{label}</path>')
        parts.append(f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5" fill="{colour}"/>')
    return "".join(parts) + "</svg>"


def _panel(title: str, curves: Mapping[str, Curve]) -> str:
    key = " · ".join(
        f'<span style="color:{colour}">●</span> {html.escape(name)} <b>{_number(curve[-1][1])}</b>'
        for colour, (name, curve) in zip(COLOURS * len(curves), curves.items())
    )
    return f'<section><h2>{html.escape(title)}</h2>{chart(curves)}<div class="key">{key}</div></section>'


def _panels(metrics: Mapping[str, Curve]) -> list[str]:
    """Return the known panels in their order, then one for each other number that was logged."""
    known = {key for keys in PANELS.values() for key in keys}
    others = {key: {key: key} for key in metrics if key not in known and key not in CONSTANTS}
    sections = []
    for title, keys in {**PANELS, **others}.items():
        curves = {name: metrics[key] for key, name in keys.items() if metrics.get(key)}
        if title == VALIDATION and len(curves) == 1:  # of a task that knows no times
            title, curves = "Validation loss", {"validation loss": metrics["val_loss"]}
        if curves and not (title.startswith("Skipped") and not any(y for curve in curves.values() for _, y in curve)):
            sections.append(_panel(title, curves))
    return sections


def _embed(path: Path) -> str:
    """Return a picture as an address that holds it: as it is, or a smaller JPEG of a large one."""
    content, kind = path.read_bytes(), "png"
    if len(content) > MAX_PICTURE_BYTES:
        with Image.open(path) as picture:
            picture.thumbnail((MAX_PICTURE_PIXELS, MAX_PICTURE_PIXELS))
            memory, kind = io.BytesIO(), "jpeg"
            picture.convert("RGB").save(memory, kind, quality=85)
        content = memory.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _grids(folder: Path) -> str:
    found = sorted(folder.glob("step-*.png"))
    pictures = [found[row] for row in evenly_spaced(len(found), MAX_GRIDS)]
    figures = []
    for path in reversed(pictures):  # the newest is what one looks for
        step = int(path.stem.removeprefix("step-"))
        figures.append(
            f'<figure><img alt="samples at step {step}" src="{_embed(path)}">'
            f"<figcaption>step {step:,}</figcaption></figure>"
        )
    return f'<section class="wide"><h2>Previews</h2><div class="grids">{"".join(figures)}</div></section>'


def render(run_directory: Path, max_steps: int | None = None, running: bool = False) -> str:
    """Return the page of a run as HTML; while it is running the page loads itself again every half minute."""
    metrics = read_metrics(run_directory / "metrics.jsonl")
    step = max((curve[-1][0] for curve in metrics.values()), default=0)
    goal = f" of {max_steps:,}" if max_steps else ""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    state = "running" if running else "not running"
    config = run_directory / "config.yaml"
    sections = _panels(metrics) or ["<section>Nothing has been logged yet.</section>"]
    if (run_directory / "samples").is_dir():
        sections.append(_grids(run_directory / "samples"))
    if config.exists():
        text = html.escape(config.read_text(encoding="utf-8"))
        sections.append(
            f'<section class="wide"><details><summary>config.yaml</summary><pre>{text}</pre></details></section>'
        )
    title = html.escape(run_directory.resolve().name)
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if running else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{refresh}'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{title}: step {step:,}</title><style>{STYLE}</style></head><body>"
        f"<h1>{title}</h1><p>step {step:,}{goal} · {state} · {now}</p>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def write_run_page(run_directory: Path, max_steps: int | None = None, running: bool = False) -> Path:
    """Write the page of a run at once; a reader sees the old one or the new one."""
    path = run_directory / PAGE
    write_atomically(path, render(run_directory, max_steps, running).encode())
    return path


def main() -> None:
    """Write the page of the run that the command line names."""
    from gspn_dit.errors import ArgumentParser, UserError
    from gspn_dit.paths import path_argument

    parser = ArgumentParser(prog="python -m gspn_dit.training.run_page", description="Write a run's index.html.")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="run directory")
    run = Path(parser.parse_args().run)
    if not (run / "metrics.jsonl").exists():
        raise UserError(f"{run} is no run directory: it has no metrics.jsonl")
    print(write_run_page(run))


if __name__ == "__main__":
    from gspn_dit.errors import run_cli

    run_cli(main)
