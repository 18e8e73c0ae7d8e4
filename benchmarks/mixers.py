"""Time and weigh scans against attention and its peers: the mixer with its projections, a DiT block, the whole DiT.

    python -m benchmarks.mixers --out benchmarks/results/mixers.json

One image of 256 to 16,384 tokens (256² to 2048² pixels at factor 8 and patch 2), float32, forward with the gradients'
bookkeeping and forward + backward. A cell is timed in turn with its rivals; the longer it takes, the less often. What
does not fit into --seconds for the whole study, or into memory, by the growth from the size before, is left out and
listed as skipped. Nothing is timed unless the mixers agree with their formulas first. The
scan runs by its fused kernels where the machine has them, and once more with its logits and gates through memory.

For all alike, glibc is told to keep freed memory, as docs/cpu_scan.md advises: or else every step would pay for fresh
pages again, which says nothing about mixers. The run that weighs a cell also warms it up.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.mixer_cases import (
    DIT_OF,
    EQUAL,
    GROUPS,
    PEER,
    VARIANTS,
    WINDOW,
    build,
    disagreement,
    keep_freed_memory,
    runner,
)
from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, UserError, run_cli

SIDES = (16, 32, 64, 128)
"""Rows and columns of tokens."""
WHATS = ("mixer", "model", "block")
"""What the claims rest on comes first, in case time runs out."""
SECONDS_OF_A_CELL, LONG_SECONDS, LONGEST_SECONDS = 1.2, 8.0, 60.0
"""Runs are repeated for about the first, three times at least and not more often than --repeats; what takes longer than
the second is timed once, and what would take longer than the third is left out."""
FEWEST_RUNS = 3
GROWTH = {"attention": 16.0, PEER: 16.0}
"""By which the time of a cell is predicted to grow from one size to the next; 5 for the others."""


@dataclass
class Cell:
    """One variant at one size."""

    name: str
    tokens: int
    variant: str
    parameters: int = 0
    forward: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None
    skipped: str | None = None

    def as_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.name, "tokens": self.tokens, "variant": self.variant}
        if self.skipped:
            return {**entry, "skipped": self.skipped}
        return {
            **entry,
            "parameters": self.parameters,
            "forward": _timing(self.forward, None),
            "forward_backward": _timing(self.total, self.cpu),
            "peak_extra_bytes": self.peak_extra_bytes,
        }


def _timing(seconds: Sequence[float], cpu: Sequence[float] | None) -> dict[str, Any]:
    from benchmarks.measure import milliseconds

    entry = {**milliseconds(seconds), "runs": len(seconds)}
    return entry if cpu is None else {**entry, "cpu_ms": round(1e3 * min(cpu), 3)}


# -- measuring -------------------------------------------------------------------------------------------------------


class Study:
    """Measures cells, the small sizes first, from which the cost of the next is predicted."""

    def __init__(
        self,
        repeats: int,
        seconds: float,
        build: Callable[[str, int, str, int], tuple[Any, tuple[Any, ...]]] = build,
        growth: Mapping[str, float] = GROWTH,
    ) -> None:
        """`build` makes a module and its inputs of (what, channels, variant, side); `growth` is as `GROWTH`."""
        from benchmarks.measure import CpuDevice

        self.device, self.repeats, self.end = CpuDevice(), repeats, time.perf_counter() + seconds
        self.build, self.growth = build, growth
        self.cells: list[Cell] = []

    def measure(self, what: str, channels: int, side: int, variants: Sequence[str]) -> None:
        """Measure variants of one size in turn."""
        runs: dict[str, Callable[[], tuple[float, float, float]]] = {}
        left: dict[str, int] = {}
        cells: dict[str, Cell] = {}
        for variant in variants:
            cells[variant] = cell = Cell(f"{what} C={channels}", side * side, variant)
            self.cells.append(cell)
            seconds, memory = self._predict(cell)
            cell.skipped = self._reason_to_skip(seconds, memory)
            if cell.skipped:
                _say(f"{cell.name}, {cell.tokens} tokens, {variant}: skipped, {cell.skipped}")
                continue
            # What is loaded once, at the first use of a mixer, is no cell's memory.
            runner(variant, *self.build(what, channels, variant, 2))()
            module, arguments = self.build(what, channels, variant, side)
            cell.parameters = sum(parameter.numel() for parameter in module.parameters())
            runs[variant] = runner(variant, module, arguments)
            left[variant] = self._weigh(cell, runs[variant])
        while any(left.values()):
            for variant in [name for name, count in left.items() if count]:
                left[variant] -= 1
                self._record(cells[variant], runs[variant]())
        for variant in runs:
            cell = cells[variant]
            _say(
                f"{cell.name}, {cell.tokens} tokens, {variant}: {1e3 * min(cell.total):.1f} ms, {len(cell.total)} runs"
            )
        gc.collect()

    def _weigh(self, cell: Cell, run: Callable[[], tuple[float, float, float]]) -> int:
        """Run once for the peak of memory, which warms up, too; return how many timed runs are to follow."""
        result: list[tuple[float, float, float]] = []
        cell.peak_extra_bytes = self.device.peak_extra_bytes(lambda: result.append(run()))
        seconds = result[0][1]
        if seconds > LONG_SECONDS:
            return 1
        return min(self.repeats, max(FEWEST_RUNS, int(SECONDS_OF_A_CELL / seconds)))

    @staticmethod
    def _record(cell: Cell, seconds: tuple[float, float, float]) -> None:
        for values, value in zip((cell.forward, cell.total, cell.cpu), seconds, strict=True):
            values.append(value)

    def _predict(self, cell: Cell) -> tuple[float | None, float | None]:
        """Return seconds and bytes from the size before: None where there is none, infinite where that was skipped."""
        before = [c for c in self.cells[:-1] if (c.name, c.variant) == (cell.name, cell.variant)]
        if not before:
            return None, None
        if before[-1].skipped:
            return math.inf, None
        memory = before[-1].peak_extra_bytes
        return self.growth.get(cell.variant, 5.0) * min(before[-1].total), None if memory is None else 4.5 * memory

    def _reason_to_skip(self, seconds: float | None, memory: float | None) -> str | None:
        if seconds is not None and (seconds > LONGEST_SECONDS or time.perf_counter() + seconds > self.end):
            return "too long" if math.isinf(seconds) else f"too long: about {seconds:.0f} s"
        if memory is not None and memory > 0.8 * _free_bytes():
            return f"too large: about {memory / 1e9:.0f} GB"
        return None


def _free_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- what it shows ---------------------------------------------------------------------------------------------------


def exponent(cells: Sequence[Cell], name: str, variant: str) -> float | None:
    """Return the slope of log time (forward + backward) against log tokens by least squares; None for one size."""
    points = [
        (math.log(cell.tokens), math.log(min(cell.total)))
        for cell in cells
        if (cell.name, cell.variant) == (name, variant) and not cell.skipped
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def times_faster(cells: Sequence[Cell], name: str, variant: str, tokens: int) -> float | None:
    """Return attention's time over a variant's, forward + backward."""
    found = {c.variant: min(c.total) for c in cells if (c.name, c.tokens) == (name, tokens) and not c.skipped}
    return found["attention"] / found[variant] if {"attention", variant} <= set(found) else None


def targets(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return what was to be shown, and whether it was."""
    faster = times_faster(cells, "model C=384", EQUAL, 256)
    rows: list[tuple[str, float | None, str, float]] = [
        ("exponent of time against tokens, model C=384, gspn", exponent(cells, "model C=384", "gspn"), "<=", 1.1),
        *(
            (f"times faster, mixer C=384, {tokens} tokens", times_faster(cells, "mixer C=384", "gspn", tokens), ">=", x)
            for tokens, x in ((4096, 3.0), (16384, 10.0))
        ),
        ("gspn over attention, model, 256 tokens, equal parameters", faster and 1 / faster, "<=", 1.3),
    ]
    return [
        {
            "target": target,
            "bound": f"{sign} {bound}",
            "value": None if value is None else round(value, 3),
            "met": None if value is None else (value <= bound if sign == "<=" else value >= bound),
        }
        for target, value, sign, bound in rows
    ]


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Draw time and memory of each width that was measured against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = [width for width in DIT_OF if any(cell.name.endswith(f" C={width}") for cell in cells)]
    rows = [(width, kind) for width in widths for kind in ("seconds", "bytes")]
    size = (13, 3.7 * len(rows))
    figure, axes = plt.subplots(len(rows), len(WHATS), figsize=size, squeeze=False, layout="constrained")
    for (width, kind), line in zip(rows, axes, strict=True):
        for what, axis in zip(WHATS, line, strict=True):
            for variant in (*VARIANTS, PEER):
                name = f"{what} C={width}"
                own = [c for c in cells if (c.name, c.variant) == (name, variant) and not c.skipped]
                values = [min(c.total) if kind == "seconds" else c.peak_extra_bytes or math.nan for c in own]
                if own:
                    axis.loglog([c.tokens for c in own], values, marker="o", label=variant)
            axis.set(xlabel="tokens", ylabel=f"{kind}, forward + backward", title=f"{what}, {width} channels")
            axis.set_xticks([side**2 for side in SIDES], [f"{side**2:,}" for side in SIDES])
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
            if axis.lines:
                axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def study(sides: Sequence[int], widths: Sequence[int], repeats: int, seconds: float) -> tuple[dict[str, Any], Any]:
    """Measure everything; return the report and the cells. Raises UserError if a mixer is wrong."""
    from benchmarks.measure import software

    if problem := disagreement():
        raise UserError(f"no figures, a mixer is wrong: {problem}")
    keeps, began, run = keep_freed_memory(), time.perf_counter(), Study(repeats, seconds)
    before = run.device.describe()
    for width in widths:
        for what in WHATS:
            for side in sides:
                more = [PEER] if what == "model" else []
                if (what, width, side) == ("model", 384, 16):
                    more.append(EQUAL)
                run.measure(what, width, side, [*VARIANTS, *more])
    names = list(dict.fromkeys(cell.name for cell in run.cells))
    exponents = {n: {v: exponent(run.cells, n, v) for v in (*VARIANTS, PEER)} for n in names}
    ratios = {
        n: {str(s * s): {v: times_faster(run.cells, n, v, s * s) for v in (*VARIANTS, PEER)} for s in sides}
        for n in names
    }
    report = {
        "benchmark": "mixers",
        "device": before,
        "software": software(),
        "settings": {
            "window": WINDOW,
            "groups": GROUPS,
            "freed_memory_is_kept": keeps,
            "seconds": seconds,
            "models": DIT_OF,
        },
        "targets": targets(run.cells),
        "exponents": rounded(exponents),
        "times_faster_than_attention": rounded(ratios),
        "cells": [cell.as_json() for cell in run.cells],
        "seconds": round(time.perf_counter() - began),
        "device_after": run.device.describe(),
    }
    return report, run.cells


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items() if value is not None}
    return round(tree, 3)


def main() -> None:
    """Measure, print what was to be shown, and write JSON and PNG."""
    parser = ArgumentParser(prog="benchmarks.mixers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="rows and columns of tokens")
    parser.add_argument("--widths", type=int, nargs="+", choices=list(DIT_OF), default=list(DIT_OF))
    parser.add_argument("--repeats", type=int, default=9, help="at most so many runs of a cell")
    parser.add_argument("--seconds", type=float, default=1500.0, help="leave out what would end later than this")
    parser.add_argument("--out", help="write the report to this JSON, and the plot to a PNG beside it")
    options = parser.parse_args()
    report, cells = study(options.sides, options.widths, options.repeats, options.seconds)
    publish(report, options.out, ("targets", "exponents", "times_faster_than_attention"))
    if options.out:
        plot(cells, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    run_cli(main)
