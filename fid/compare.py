"""`python -m fid compare A B …`: reports side by side in one table with intervals; unlike ones only on request."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.errors import ArgumentParser, UserError
from gspn_dit.files import write_whole
from gspn_dit.paths import path_argument

FORMAT_VERSION = 2
MARK = "*"
# what two reports must share to be compared, as (words, where it lies in the report)
CONDITIONS = (
    ("the protocol", ("settings", "protocol")),
    ("the feature extractor", ("settings", "feature_net", "sha256")),
    ("the other nets", ("settings", "other_nets")),
    ("the reference", ("settings", "reference", "sha256")),
    ("the reference's statistics", ("settings", "reference", "statistics")),
    ("the number of samples", ("settings", "samples", "n")),
)
KNOBS = ("sampler", "num_inference_steps", "guidance_scale", "seed", "weights", "step")


def build_parser() -> ArgumentParser:
    """The arguments of `python -m fid compare`."""
    parser = ArgumentParser(prog="python -m fid compare", description="Put reports side by side in one table.")
    parser.add_argument(
        "reports", type=path_argument, nargs="+", metavar="REPORT", help="report directories, or report.json files"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="also write the table (Markdown) to this file"
    )
    parser.add_argument(
        "--allow-mixed",
        action="store_true",
        help="compare reports of different protocols, nets, references or numbers of samples, with a mark",
    )
    return parser


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a report directory's report.json, or of that file."""
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no report at {path}: there is no {file}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the report {file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"scores", "intervals", "settings", "names"} <= set(found):
        raise UserError(f"{file} is no report that python -m fid wrote")
    if found.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {found.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "evaluate the samples again"
        )
    if not isinstance(found["settings"], dict) or not {"protocol", "generation"} <= set(found["settings"]):
        raise UserError(f"{file} is no report that python -m fid wrote: it does not say how it came about")
    return found


def condition(report: dict[str, Any], place: tuple[str, ...]) -> Any:
    """The value at a place of `CONDITIONS`."""
    value: Any = report
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def first_difference(report: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What keeps two reports from being compared, in words, or None."""
    for words, place in CONDITIONS:
        values = condition(report, place), condition(other, place)
        if values[0] == values[1]:
            continue
        if words == "the protocol":
            names = [value["name"] for value in values]
            changed = [key for key in values[0] if values[0].get(key) != values[1].get(key)]
            detail = ", ".join(f"{key} {values[0][key]!r} / {values[1].get(key)!r}" for key in changed)
            return f"{words} ({' / '.join(names)})" if names[0] != names[1] else f"{words}'s {detail}"
        shown = [value[:12] if isinstance(value, str) else value for value in values]
        return f"{words} ({shown[0]} / {shown[1]})"
    return None


def compare(paths: Sequence[str | os.PathLike[str]], allow_mixed: bool = False) -> list[tuple[str, ...]]:
    """Rows of one table, the heading first: a score per row, a report per column, each with its 95 % interval.

    Raises:
        UserError: fewer than two reports, or reports that do not compare, without `allow_mixed`.
    """
    if len(paths) < 2:
        raise UserError("compare needs at least two reports")
    reports = [read_report(path) for path in paths]
    marks = [""]
    for path, report in zip(paths[1:], reports[1:], strict=True):
        difference = first_difference(reports[0], report)
        if difference and not allow_mixed:
            raise UserError(
                f"{paths[0]} and {path} differ in {difference}: their scores do not compare; --allow-mixed shows them "
                "all the same, with a mark"
            )
        marks.append(MARK if difference else "")
    heading = ("score", *(f"{path}{mark}" for path, mark in zip(paths, marks, strict=True)))
    names = list(dict.fromkeys(name for report in reports for name in report["scores"]))
    rows = [(name, *(_cell(report, name) for report in reports)) for name in names]
    knobs = [(name, *(_knob(report, name) for report in reports)) for name in KNOBS]
    return [heading, *rows, *(row for row in knobs if any(cell != "–" for cell in row[1:]))]


def _cell(report: dict[str, Any], name: str) -> str:
    value = report["scores"].get(name)
    if value is None:
        return "–"
    value = value["mean"] if isinstance(value, dict) else value
    text = str(value) if isinstance(value, int) else f"{value:.4g}"
    interval = report["intervals"].get(name)
    return f"{text} [{interval['low']:.4g}, {interval['high']:.4g}]" if interval else text


def _knob(report: dict[str, Any], name: str) -> str:
    value = (report["settings"]["generation"] or {}).get(name)
    return "–" if value is None else str(value)


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    """The table and, below it, what the brackets and marks mean."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in body]
    lines += ["", "[…]: 95 % intervals of each report alone; corrected infinitesimal jackknife for Fréchet distances."]
    if any(cell.endswith(MARK) for cell in heading):
        lines.append(f"{MARK} Another protocol, net, reference or number of samples than the first: does not compare.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Parse the arguments, print the table, write it where asked."""
    options = build_parser().parse_args(arguments)
    table = markdown_table(compare(options.reports, options.allow_mixed))
    if options.out:
        try:
            write_whole(Path(options.out), table.encode())
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    print(table, end="")
