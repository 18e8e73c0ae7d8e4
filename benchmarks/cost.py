"""What a whole model costs: scans beside their rivals at equal parameters, by tokens, in time and memory, in one run.

    python -m benchmarks.cost --out benchmarks/results/cost.json

The contenders of `benchmarks.quality` with their default options, on latents of 4 channels at patch 1, one image of 64
to 16,384 tokens in float32, forward with the gradients' bookkeeping and forward + backward. How cells are timed in
turn, weighed and left out is that of `benchmarks.mixers`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, REFERENCE, fitted, reference_parameters
from benchmarks.mixer_cases import disagreement, keep_freed_memory
from benchmarks.mixers import Cell, Study, exponent, rounded, times_faster
from benchmarks.output import publish
from benchmarks.scoring import DATA_SETS
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import cannot_hold

SIDES = (8, 16, 32, 64, 128)
"""Rows and columns of tokens."""
DATA = DATA_SETS["fashion-latents"]
"""The data set whose channels, classes and patch the models have."""
QUADRATIC = 16.0
"""By which the time of attention is predicted to grow from a side to its double."""


def builder(size: str) -> Any:
    """Return a function that makes a contender's model of a size with the inputs of one image of side² tokens."""

    def build(what: str, channels: int, contender: str, side: int) -> tuple[Any, tuple[Any, ...]]:
        import torch

        from gspn_dit.models import create_model

        options = dict(fitted(contender, CONTENDERS[contender].settings(1)[0], DATA, size))
        torch.manual_seed(0)
        model = create_model(options.pop("name"), 10, 4, side, **options)
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
        return model, (latents, torch.tensor([500.0]), torch.tensor([3]))

    return build


def study(size: str, sides: Sequence[int], contenders: Sequence[str], repeats: int, seconds: float) -> dict[str, Any]:
    """Measure every contender at every size; return the report. Raises UserError if a mixer is wrong."""
    from benchmarks.measure import software
    from gspn_dit.models.presets import DIT_PRESETS

    if problem := disagreement():
        raise UserError(f"no figures, a mixer is wrong: {problem}")
    growth = {name: QUADRATIC for name in contenders if CONTENDERS[name].base["mixer"] == "attention"}
    keeps, began, run = keep_freed_memory(), time.perf_counter(), Study(repeats, seconds, builder(size), growth)
    before, width = run.device.describe(), DIT_PRESETS[size].hidden_size
    for side in sides:
        run.measure("model", width, side, contenders)
    name = f"model C={width}"
    return {
        "benchmark": "cost",
        "device": before,
        "software": software(),
        "settings": {"size": size, "freed_memory_is_kept": keeps, "parameters": reference_parameters(DATA, size)},
        "exponents": rounded({one: exponent(run.cells, name, one) for one in contenders}),
        "times_faster_than_attention": rounded(
            {str(s * s): {one: times_faster(run.cells, name, one, s * s) for one in contenders} for s in sides}
        ),
        "megabytes": {str(s * s): megabytes(run.cells, s * s) for s in sides},
        "cells": [cell.as_json() for cell in run.cells],
        "seconds": round(time.perf_counter() - began),
        "device_after": run.device.describe(),
    }


def megabytes(cells: Sequence[Cell], tokens: int) -> dict[str, float]:
    """Return the peak of memory of forward + backward, by contender, of those that were weighed."""
    return {
        cell.variant: round(cell.peak_extra_bytes / 1e6, 1)
        for cell in cells
        if cell.tokens == tokens and cell.peak_extra_bytes is not None
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print what grows how, and write the report."""
    from gspn_dit.models.presets import DIT_PRESETS

    parser = ArgumentParser(prog="benchmarks.cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(DIT_PRESETS), default="S", help="preset whose parameters all have")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="rows and columns of tokens")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=9, help="at most so many runs of a cell")
    parser.add_argument("--seconds", type=float, default=3600.0, help="leave out what would end later than this")
    parser.add_argument("--out", type=Path, help="write the report to this JSON")
    options = parser.parse_args(arguments)
    if min(options.sides) < 1:
        raise UserError(f"--sides is {' '.join(map(str, options.sides))}, but each must be at least 1")
    if REFERENCE not in options.contenders:
        raise UserError(f"--contenders lacks {REFERENCE}, which the others are measured by; add it")
    if options.out and (problem := cannot_hold(options.out)):
        raise UserError(f"--out {problem}")
    sides, contenders = sorted(set(options.sides)), list(dict.fromkeys(options.contenders))
    report = study(options.size, sides, contenders, options.repeats, options.seconds)
    publish(report, options.out, ("exponents", "times_faster_than_attention", "megabytes"))


if __name__ == "__main__":
    run_cli(main)
