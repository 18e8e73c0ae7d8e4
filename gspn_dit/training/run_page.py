"""A page to watch a run by: curves and sample grids in one file that needs no server, no script and no network.

    python -m gspn_dit.training.run_page RUN

writes RUN/index.html from metrics.jsonl, config.yaml and samples/; training does so by itself whenever it validates,
samples or saves. Behind the curves of a run of a shipped config lie those of its reference in grey, and beside its
newest samples those of the reference, from the first checkpoint on.
"""

from __future__ import annotations

import base64
import datetime
import html
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gspn_dit.data.images import evenly_spaced
from gspn_dit.files import write_atomically
from gspn_dit.training.charts import PLAIN, Axis, Backdrop, Curve, document, panel, read_metrics
from gspn_dit.training.reference import Reference, reference_of

PAGE = "index.html"
REFRESH_SECONDS = 30
MAX_GRIDS = 9
MAX_PICTURE_BYTES = 300_000
MAX_PICTURE_PIXELS = 1_200
"""Height and width to which larger grids are reduced."""


@dataclass(frozen=True)
class Panel:
    """What is drawn together: keys of metrics.jsonl with their names, and how their values are shown."""

    title: str
    keys: Mapping[str, str]
    axis: Axis = PLAIN
    unless_zero: bool = False
    """Left out while there is nothing to tell."""

    def curves(self, metrics: Mapping[str, Curve]) -> dict[str, Curve]:
        """Return the curves that a run has, by name."""
        found = {name: metrics[key] for key, name in self.keys.items() if metrics.get(key)}
        told = not self.unless_zero or any(y for curve in found.values() for _, y in curve)
        return found if told else {}

    def behind(self, reference: Reference) -> Backdrop | None:
        """Return what is drawn behind the curves, None if the reference has nothing of the kind."""
        found = {name: reference.curves[key] for key, name in self.keys.items() if key in reference.curves}
        return Backdrop(f"reference: {reference.name}", found) if found else None


QUARTILES = {
    "val_loss": "all times",
    "val_loss_q1": "t < ¼ (nearly clean)",
    "val_loss_q2": "¼ to ½",
    "val_loss_q3": "½ to ¾",
    "val_loss_q4": "t ≥ ¾ (nearly noise)",
}
PANELS = (
    Panel("Training loss", {"loss": "loss"}),
    Panel("Validation loss by time t", QUARTILES),
    Panel("Validation accuracy", {"val_top1": "top-1", "val_top5": "top-5"}),
    Panel("Learning rate", {"learning_rate": "learning rate"}, Axis(linear=True)),
    Panel("Gradient norm before clipping", {"grad_norm": "gradient norm"}),
    Panel("Speed", {"images_per_second": "speed"}, Axis("images/s")),
    Panel("Arithmetic of the model", {"model_flops_per_second": "speed"}, Axis("FLOP/s", scaled=True)),
    Panel("Peak memory", {"peak_memory_bytes": "memory"}, Axis("B", scaled=True, linear=True)),
    Panel("Quick FD (of few samples: to follow, not to quote)", {"quick_fd": "FD"}),
    Panel("Skipped non-finite steps", {"nonfinite_steps": "steps"}, unless_zero=True),
    Panel("Skipped steps of an exploded loss", {"spikes": "steps"}, unless_zero=True),
)
CONSTANTS = ("quick_fd_samples",)
"""Numbers that say how others were measured, and need no curve."""


def panels_of(keys: Iterable[str]) -> list[Panel]:
    """Return the known panels in their order, then one for each other number that was logged."""
    known = {key for each in PANELS for key in each.keys}
    return [*PANELS, *(Panel(key, {key: key}) for key in dict.fromkeys(keys) if key not in {*known, *CONSTANTS})]


WITHOUT_TIMES = Panel("Validation loss", {"val_loss": "validation loss"})
"""In place of the quartiles where a task knows no times."""


def _sections(metrics: Mapping[str, Curve], reference: Reference | None) -> list[str]:
    sections = []
    for each in panels_of(metrics):
        shown = WITHOUT_TIMES if each.keys is QUARTILES and not metrics.keys() & {*QUARTILES} - {"val_loss"} else each
        if curves := shown.curves(metrics):
            sections.append(panel(shown.title, curves, shown.axis, shown.behind(reference) if reference else None))
    return sections


def embed(path: Path) -> str:
    """Return a picture as an address that holds it: as it is, or a smaller JPEG of a large one."""
    content, kind = path.read_bytes(), "png"
    if len(content) > MAX_PICTURE_BYTES:
        with Image.open(path) as picture:
            picture.thumbnail((MAX_PICTURE_PIXELS, MAX_PICTURE_PIXELS))
            memory, kind = io.BytesIO(), "jpeg"
            picture.convert("RGB").save(memory, kind, quality=85)
        content = memory.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _grids(folder: Path, reference: Reference | None) -> str:
    found = sorted(folder.glob("step-*.png"))
    pictures = [found[row] for row in evenly_spaced(len(found), MAX_GRIDS)]
    figures = []
    for path in reversed(pictures):  # the newest is what one looks for
        step = int(path.stem.removeprefix("step-"))
        figures.append(
            f'<figure><img alt="samples at step {step}" src="{embed(path)}">'
            f"<figcaption>step {step:,}</figcaption></figure>"
        )
    if reference is not None and reference.grid is not None:  # beside the newest
        name = html.escape(f"reference: {reference.name}")
        figures.insert(
            1,
            f'<figure><img alt="samples of the {name}" src="{embed(reference.grid)}">'
            f"<figcaption>{name}</figcaption></figure>",
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
    reference = reference_of(run_directory)
    sections = _sections(metrics, reference) or ["<section>Nothing has been logged yet.</section>"]
    if (run_directory / "samples").is_dir():
        sections.append(_grids(run_directory / "samples", reference))
    if config.exists():
        text = html.escape(config.read_text(encoding="utf-8"))
        sections.append(
            f'<section class="wide"><details><summary>config.yaml</summary><pre>{text}</pre></details></section>'
        )
    name = run_directory.resolve().name
    body = f"<h1>{html.escape(name)}</h1><p>step {step:,}{goal} · {state} · {now}</p><main>{''.join(sections)}</main>"
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if running else ""
    return document(f"{name}: step {step:,}", body, refresh)


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
