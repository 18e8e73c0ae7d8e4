"""One self-attention layer of SDXL against the scans that take its place: time, memory and how they grow.

    python -m benchmarks.text_to_image --out benchmarks/results/text_to_image.json

Forward passes of one sample, as guidance runs them in turn. Attention is diffusers' with
`scaled_dot_product_attention`. At the grids of a 16384×8192 image scans are measured; attention is extrapolated from
its largest measured grid with the square of the tokens, and marked so. What was measured of a grid is kept in `--work`,
so that the command can be stopped, and goes on when it is given again.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from benchmarks.measure import CpuDevice, software
from benchmarks.output import publish
from benchmarks.study import once
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.models.unet_scans import GSPNSelfAttention

WIDTHS = {640: (1024, 512), 1280: (512, 256)}
"""Channels of SDXL's layers, and their grids in an image of 16384×8192 pixels."""
LAYERS = {640: 10, 1280: 60}
SIDES = (32, 64, 128, 256)
HEAD = 64
LARGE_TOKENS = 2**14
LARGE_RUNS = 4
"""At most so many on a grid of that many tokens, the first of which finds no memory at hand."""
PUBLISHED_SPEEDUP = 84
"""Of a whole image of 16K×8K on one A100, from the paper's own figure; neither steps nor shape are stated there."""


class Layers:
    """The rivals at a width, with weights of one seed."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.width = width
        self.attention = Attention(width, heads=width // HEAD, dim_head=HEAD, bias=False).eval()
        self.scans = GSPNSelfAttention(width).eval()

    def tokens(self, height: int, width: int) -> Tensor:
        return torch.randn(1, height * width, self.width, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run(self, name: str, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attention(tokens) if name == "attention" else self.scans(tokens, gspn_grid=grid)


def measure(layers: Layers, grid: tuple[int, int], names: tuple[str, ...], seconds: float) -> list[dict[str, Any]]:
    """Weigh and time the rivals on a grid: in turn on small ones, each by itself on large ones."""
    device, tokens, entries = CpuDevice(seconds), layers.tokens(*grid), []
    large = grid[0] * grid[1] >= LARGE_TOKENS
    runs = {name: functools.partial(layers.run, name, tokens, grid) for name in names}
    timings = {} if large else device.time_together(runs, repeats=7)
    for name, run in runs.items():
        began = time.perf_counter()
        extra = device.peak_extra_bytes(run)
        first = time.perf_counter() - began
        facts = timings[name].as_json() if name in timings else best_of_few(run, first, seconds)
        place = {"shape": [*grid, layers.width], "mixer": name, "tokens": grid[0] * grid[1]}
        load = round(os.getloadavg()[0], 1)
        entries.append({**place, **facts, "extra_bytes": extra, "extrapolated": False, "load_average": load})
        print(f"{place['shape']} {name}: {facts['best_ms']:.1f} ms, {(extra or 0) / 1e6:.0f} MB", flush=True)
    return entries


def best_of_few(run: Callable[[], Any], first: float, seconds: float) -> dict[str, Any]:
    """Return the best of a first run, which took so long while it was weighed, and of others where there is time."""
    taken = [first]
    while len(taken) < LARGE_RUNS and sum(taken) + first < seconds:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return {"best_ms": round(1e3 * min(taken), 1), "runs": len(taken)}


def exponent(entries: list[dict[str, Any]]) -> float:
    """Return how time grows with the tokens between the two largest grids."""
    small, large = sorted(entries, key=lambda entry: entry["tokens"])[-2:]
    return math.log(large["best_ms"] / small["best_ms"]) / math.log(large["tokens"] / small["tokens"])


def extrapolate(entries: list[dict[str, Any]], grid: tuple[int, int]) -> dict[str, Any]:
    """Return attention on a larger grid, with the square of the tokens."""
    known = max(entries, key=lambda entry: entry["tokens"])
    tokens = grid[0] * grid[1]
    milliseconds = known["best_ms"] * (tokens / known["tokens"]) ** 2
    facts = {"mixer": "attention", "tokens": tokens, "best_ms": round(milliseconds, 1), "extrapolated": True}
    return {"shape": [*grid, known["shape"][2]], **facts, "from_tokens": known["tokens"]}


class Clock:
    """When to stop: no grid is begun after so many seconds."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raise UserError where the time is over."""
        if time.monotonic() > self.end:
            raise UserError("the time is over, and some grids are left; give the same command again to go on")


def study(sides: tuple[int, ...], whole: bool, seconds: float, work: Path, clock: Clock) -> dict[str, Any]:
    """Measure both widths; `whole` adds the grids of 16384×8192. Raises UserError when the clock has run down."""
    entries, exponents = [], {}
    totals = {"attention": 0.0, "gspn": 0.0}

    def kept(layers: Layers, grid: tuple[int, int], names: tuple[str, ...]) -> list[dict[str, Any]]:
        file = work / f"{layers.width}-{grid[0]}x{grid[1]}-{'-'.join(names)}.json"
        if not file.exists():
            clock.check()
        return once(file, lambda: measure(layers, grid, names, seconds))

    for width, grid in WIDTHS.items():
        layers = Layers(width)
        for side in sides:
            entries += kept(layers, (side, side), ("attention", "gspn"))
        mine = {name: [e for e in entries if e["shape"][2] == width and e["mixer"] == name] for name in totals}
        exponents[str(width)] = {name: round(exponent(of_name), 3) for name, of_name in mine.items()}
        if whole:
            large = [*kept(layers, grid, ("gspn",)), extrapolate(mine["attention"], grid)]
            entries += large
            for entry in large:
                totals[entry["mixer"]] += LAYERS[width] * entry["best_ms"] / 1e3
    result: dict[str, Any] = {"entries": entries, "exponents": exponents}
    if whole:
        result["all_70_layers_at_16384x8192_seconds"] = {name: round(value, 1) for name, value in totals.items()}
        result["ratio"] = {
            "value": round(totals["attention"] / totals["gspn"], 1),
            "of": "self-attention layers alone, attention extrapolated",
            "published_whole_image_on_an_A100": PUBLISHED_SPEEDUP,
        }
    return result


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks.text_to_image", description="Time SDXL's self-attention against scans.")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="of square grids of tokens")
    parser.add_argument("--no-whole", action="store_true", help="leave the grids of a 16384×8192 image out")
    parser.add_argument("--seconds", type=float, default=30, help="for the rivals on one grid, after a few rounds")
    parser.add_argument("--work", type=Path, default=Path("runs/text_to_image"), help="where measured grids are kept")
    parser.add_argument("--at-most", type=float, metavar="SECONDS", help="begin no grid after so long, and stop")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    facts = {"device": CpuDevice().describe(), "software": software(), "dtype": "float32"}
    clock = Clock(options.at_most)
    result = {**facts, **study(tuple(options.sides), not options.no_whole, options.seconds, options.work, clock)}
    publish(result, options.out, ("exponents", "ratio"))


if __name__ == "__main__":
    run_cli(main)
