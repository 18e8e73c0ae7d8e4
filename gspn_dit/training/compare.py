"""One page that lays the curves of several runs over each other, and says in which settings they differ.

    python -m gspn_dit.training.compare RUN RUN --out compare.html

The page is one file that needs no server, no script and no network, as that of a run.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gspn_dit.config import flatten
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import cannot_hold, write_atomically
from gspn_dit.paths import path_argument
from gspn_dit.training.charts import Curve, document, panel, read_metrics
from gspn_dit.training.run_directory import newest_grid
from gspn_dit.training.run_page import embed, panels_of

TABLE = """
table { border-collapse: collapse; } .settings { overflow-x: auto; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
"""


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run: the shortest end of its path that no other has.

    >>> run_names([Path("/runs/a/demo"), Path("/runs/b/demo"), Path("/runs/c")])
    ['a/demo', 'b/demo', 'c']
    """
    parts = [run.resolve().parts for run in runs]

    def end(number: int, length: int) -> tuple[str, ...]:
        return parts[number][-length:]

    names = []
    for number, mine in enumerate(parts):
        others = [other for other in range(len(parts)) if other != number]
        length = next((n for n in range(1, len(mine)) if all(end(o, n) != end(number, n) for o in others)), len(mine))
        names.append("/".join(end(number, length)))
    return names


def differing_settings(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return rows (key, value in each run) of the settings that are not the same everywhere, but for `output_dir`."""
    flat = [dict(flatten(dict(config))) for config in configs.values()]
    keys = dict.fromkeys(key for each in flat for key in each if key != "output_dir")
    rows = [(key, *("–" if each.get(key) is None else str(each[key]) for each in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def render(runs: Sequence[Path]) -> str:
    """Return the page as HTML; raises UserError for what is no run."""
    names = run_names(runs)
    metrics = {name: _metrics(run) for name, run in zip(names, runs, strict=True)}
    configs = {name: _config(run) for name, run in zip(names, runs, strict=True)}
    sections = []
    for each in panels_of(key for found in metrics.values() for key in found):
        for key, title in each.keys.items():
            curves: dict[str, Curve] = {name: found[key] for name, found in metrics.items() if found.get(key)}
            if curves and not (each.unless_zero and not any(y for curve in curves.values() for _, y in curve)):
                heading = each.title if len(each.keys) == 1 else f"{each.title}: {title}"
                sections.append(panel(heading, curves, each.axis))
    sections.append(_settings(names, differing_settings(configs)))
    if figures := [_figure(name, path) for name, run in zip(names, runs) if (path := newest_grid(run)) is not None]:
        pictures = "".join(figures)
        sections.append(f'<section class="wide"><h2>Newest previews</h2><div class="grids">{pictures}</div></section>')
    title = f"{len(runs)} runs"
    body = f"<h1>{title}</h1><p>{html.escape(' · '.join(names))}</p><main>{''.join(sections)}</main>"
    return document(title, body, style=TABLE)


def _metrics(run: Path) -> dict[str, Curve]:
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is no run directory: it has no metrics.jsonl")
    return read_metrics(run / "metrics.jsonl")


def _config(run: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from None


def _settings(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<section class="wide"><h2>Settings</h2>The same in all runs.</section>'
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in ('setting', *names))}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    table = f'<div class="settings"><table>{"".join(lines)}</table></div>'
    return f'<section class="wide"><h2>Settings that differ</h2>{table}</section>'


def _figure(name: str, path: Path) -> str:
    step = int(path.stem.removeprefix("step-"))
    caption = f"{html.escape(name)}, step {step:,}"
    return f'<figure><img alt="{caption}" src="{embed(path)}"><figcaption>{caption}</figcaption></figure>'


def main() -> None:
    """Write the page of the runs that the command line names."""
    parser = ArgumentParser(prog="python -m gspn_dit.training.compare", description="Lay runs' curves over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=path_argument, help="run directories, at least two")
    parser.add_argument("--out", type=path_argument, default="compare.html", metavar="FILE", help="the page")
    options = parser.parse_args()
    runs, out = [Path(run) for run in dict.fromkeys(options.runs)], Path(options.out)
    if len(runs) < 2:
        raise UserError("compare needs at least two different runs")
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; give a file")
    if problem := cannot_hold(out):
        raise UserError(f"--out {problem}")
    page = render(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode())
    print(out)


if __name__ == "__main__":
    run_cli(main)
