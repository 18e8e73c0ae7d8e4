"""What a block is made of: each part alone beside the base, then the best parts together.

    python -m benchmarks.block --kept 10 --data fashion fashion-256 --jobs 2 --out benchmarks/results/block.json
    python -m benchmarks.block --base conv --kept 3 --data fashion --jobs 2 --out benchmarks/results/block_conv.json

The base is a contender of `benchmarks.quality`: scans, or one of their rivals, whose parts are searched alike. All have
as many parameters as attention's defaults and as much of the processor's time, and are judged by the validation loss,
on seeds that `benchmarks.quality` never scores: what is chosen here takes part there. First every part changes the base
alone, at the base's best learning rate and for half of the time. The best go on, for the whole time and each at its own
best learning rate: three around the base's, and on beyond the better end. Then they join the base one after the other,
the best first, and stay where the loss falls; what is left is compared with the base once more, with other seeds. A
study can be stopped and started again: what is done is kept. A part that is bad at the base's learning rate may be good
at another: `--own-rates` gives the parts that it names, and the base, the whole grid of them instead, and joins none.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import calibration, scoring
from benchmarks.contenders import CONTENDERS, Setting, describe, fitted
from benchmarks.contest import SEARCH_ROUNDS, Cell, at_once, trained
from benchmarks.output import publish
from benchmarks.protocol import CENTRE, SEARCH_SEED, Protocol, rate_grid, tried_rates
from benchmarks.quality import without_nan
from benchmarks.scoring import DataSet, add_data_options, chosen
from benchmarks.study import check_jobs_and_places, commit, once
from gspn_dit.errors import ArgumentParser, UserError, run_cli

SCANS = "gspn-normed"
"""The contender that is searched unless another is named."""
U_SHAPED, PUBLISHED = "gspn-u", "gspn-published-normed"
_HEADS: dict[str, dict[str, Any]] = {"twice the heads": {"num_heads": 4}}
_RMS: dict[str, dict[str, Any]] = {"RMS norms": {"norm": "rms"}}
_MLP_AND_NORMS: dict[str, dict[str, Any]] = {"SwiGLU": {"mlp": "swiglu"}, **_RMS}
_NO_POSITIONS: dict[str, dict[str, Any]] = {"no positions": {"positions": False}}
_HYBRID: dict[str, dict[str, Any]] = {"attention in every third block": {"attention_every": 3}}
_MIXTURE: dict[str, dict[str, Any]] = {"convolution in every other block": {"conv_every": 2}}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    SCANS: {
        "no norm, no skip": {"scan_norm": None, "channel_skip": False},
        "norm without skip": {"channel_skip": False},
        "RMS norm of the scan": {"scan_norm": "rms"},
        "norm before the scan": {"scan_norm": "layer", "scan_norm_place": "before"},
        "norm of each direction": {"scan_norm": "layer", "scan_norm_place": "directions"},
        "skip from the proxy": {"scan_skip": True},
        "no lpu": {"lpu": False},
        "stem convolution for lpu": {"lpu": False, "stem_conv": True},
        "stem convolution": {"stem_conv": True},
        "positions": {"positions": True},
        "scan of ½ the channels": {"scan_expansion": 0.5},
        "scan of 1.5 the channels": {"scan_expansion": 1.5},
        "one weight for all channels": {"weight_groups": 1},
        "a weight per channel": {"weight_groups": None},
        "proxy of twice the channels": {"proxy_ratio": 8},
        "proxy of four times the channels": {"proxy_ratio": 4},
        "two directions": {"scan_directions": ("right", "down")},
        "two directions by turns": {"scan_directions": ("right", "down"), "scan_alternate": True},
        "windows in every other block": {"scan_window": 4, "scan_global_every": 2},
        **_HYBRID,
        **_MIXTURE,
        "gate of the channels": {"channel_gate": True},
        "gates of ½": {"gate_scale": 0.5},
        "gates of 2": {"gate_scale": 2.0},
        **_MLP_AND_NORMS,
    },
    "attention-lpu": {
        "rotary positions": {"rotary": True},
        **_NO_POSITIONS,
        "stem convolution for lpu": {"lpu": False, "stem_conv": True},
        **_HEADS,
        **_MLP_AND_NORMS,
    },
    "conv": {
        **_NO_POSITIONS,
        "lpu": {"lpu": True},
        "stem convolution": {"stem_conv": True},
        **_MLP_AND_NORMS,
    },
    "linear": {**_NO_POSITIONS, "lpu": {"lpu": True}, **_HEADS, **_MLP_AND_NORMS},
    # What was found for these blocks at 64 and 256 tokens, searched again for more.
    "gspn2": {
        "four directions": {"scan_directions": ("right", "left", "down", "up"), "scan_alternate": False},
        "convolution in every third block": {"conv_every": 3},
        "proxy of half the model's channels": {"proxy_ratio": 2},
        "gate of the channels": {"channel_gate": True},
        **_HYBRID,
        **_RMS,
    },
    "attention-tuned": {
        "rotary positions": {"rotary": True},
        "stem convolution": {"stem_conv": True},
        **_MIXTURE,
        **_HEADS,
        **_NO_POSITIONS,
        **_RMS,
    },
    "conv-tuned": {
        "lpu": {"lpu": True},
        "stem convolution": {"stem_conv": True},
        "GELU": {"mlp": "gelu"},
        **_HYBRID,
        **_NO_POSITIONS,
        **_RMS,
    },
    "linear-tuned": {
        "stem convolution": {"stem_conv": True},
        **_MIXTURE,
        **_HYBRID,
        **_HEADS,
        **_NO_POSITIONS,
        **_RMS,
    },
}
"""What each changes in a contender, the base; two that name one option do not join."""
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "U-shape": (U_SHAPED, {}),
    "U-shape without long skips": (U_SHAPED, {"long_skips": False}),
    "U-shape with lpu": (U_SHAPED, {"lpu": True}),
    "U-shape with adaLN": (U_SHAPED, {"conditioning": "adaln-zero"}),
    "published block, norm and skip": (PUBLISHED, {}),
    "published block, norm and skip, no long skips": (PUBLISHED, {"long_skips": False}),
}
"""What is tried beside scans in DiT's block: a contender, and what is changed in it."""
SHARE = 0.5
"""Of the time, in the first round."""
KEPT = 8
"""That go on to the second."""
RATES, OWN_RATES = 5, 3
"""Learning rates of the base's grid, and of those around its best one with which the later rounds begin."""
CONFIRMING_SEEDS = (SEARCH_SEED + 1, SEARCH_SEED + 2)
"""With which the block that was chosen and the base are trained once more."""


@dataclass(frozen=True)
class Candidate:
    """A block: a contender and what is changed in it."""

    name: str
    contender: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.contender} {describe(self.setting) or 'defaults'}"

    def joined(self, name: str, part: Mapping[str, Any]) -> Candidate:
        """Return this with a part more."""
        return Candidate(name, self.contender, tuple(sorted({**dict(self.setting), **part}.items())))


def candidates(contender: str) -> list[Candidate]:
    """Return the base, then every part alone, then the other blocks, all else as those contenders have it."""
    base = _untouched(contender)
    parts = [base.joined(name, part) for name, part in PARTS[contender].items()]
    others = BLOCKS.items() if contender == SCANS else ()
    return [base, *parts, *(_untouched(other).joined(name, change) for name, (other, change) in others)]


def _untouched(contender: str) -> Candidate:
    return Candidate(contender, contender, CONTENDERS[contender].settings(1)[0])


def named(contender: str, names: Sequence[str]) -> list[Candidate]:
    """Return the base and those candidates alone; raises UserError for a name that is none."""
    base, *others = candidates(contender)
    if unknown := sorted(set(names) - {one.name for one in others}):
        raise UserError(f"--own-rates names {unknown[0]!r}, but takes of {[one.name for one in others]}")
    return [base, *(one for one in others if one.name in names)]


Losses = Mapping[str, float]
"""Validation loss by data set."""


def over(losses: Losses, base: Losses) -> float:
    """Return the geometric mean of losses over the base's; infinite where a training diverged."""
    return statistics.geometric_mean(losses[name] / base[name] for name in base)


def in_order(found: Mapping[str, Losses], base: Losses) -> list[str]:
    """Return the names by their losses over the base's, the best first."""
    return sorted(found, key=lambda name: over(found[name], base))


class Search:
    """The rounds of a search.

    Args:
        names: of data sets.
        loss: trains a candidate on a data set at a learning rate for a share of the time with a seed, and returns its
            validation loss, infinite if it diverges.
    """

    def __init__(self, names: Sequence[str], loss: Callable[[Candidate, str, float, float, int], float]) -> None:
        self.names, self.loss = names, loss
        self.rates: dict[str, float] = {}
        """Of the base, by data set."""
        self.own_rates: dict[tuple[str, str], float] = {}
        """The best of each block that had several, by its name and data set."""

    def run(self, tried: Sequence[Candidate], kept: int) -> dict[str, Any]:
        """Return what every round found; the first candidate is the base."""
        base, *others = tried
        grids = {name: self.try_rates(base, name, rate_grid(CENTRE, RATES)) for name in self.names}
        self.rates = {name: self.own_rates[base.name, name] for name in self.names}
        alone = self.alone(tried)
        own = {name: grid[self.rates[name]] for name, grid in grids.items()}
        going = in_order({one.name: alone[one.name] for one in others}, alone[base.name])[:kept]
        best = self.at_own_rates([one for one in others if one.name in going])
        winner, together = self.join(base, own, best)
        return {
            "base": {"rates": grids, "loss": own},
            "alone": _told(alone, alone[base.name]),
            "best": _told(best, own),
            "together": together,
            "winner": {"block": winner.name, "options": dict(winner.setting), **self.confirmed(base, winner)},
        }

    def at_all_rates(self, tried: Sequence[Candidate]) -> dict[str, Any]:
        """Return the losses after the whole time, each at the best of the base's whole grid of learning rates."""
        losses = self._at_best(tried, lambda _: rate_grid(CENTRE, RATES))
        return {"best": _told(losses, losses[tried[0].name])}

    def try_rates(self, one: Candidate, name: str, grid: Sequence[float]) -> dict[float, float]:
        """Return the loss by learning rate after the whole time, tried until the best lies inside."""
        found = tried_rates(
            grid, lambda rates: at_once(lambda rate: self.loss(one, name, rate, 1.0, SEARCH_SEED), rates)
        )
        self.own_rates[one.name, name] = min(found, key=lambda rate: found[rate])
        return found

    def alone(self, tried: Sequence[Candidate]) -> dict[str, dict[str, float]]:
        """Return the losses of candidates at the base's learning rates after a share of the time."""
        return self._by_name(tried, lambda one, name: self.loss(one, name, self.rates[name], SHARE, SEARCH_SEED))

    def at_own_rates(self, tried: Sequence[Candidate]) -> dict[str, dict[str, float]]:
        """Return the losses of candidates after the whole time, each at its best learning rate."""
        return self._at_best(tried, lambda name: rate_grid(self.rates[name], OWN_RATES))

    def _at_best(
        self, tried: Sequence[Candidate], grid: Callable[[str], Sequence[float]]
    ) -> dict[str, dict[str, float]]:
        """Return the losses of candidates after the whole time at the best learning rates of each data set's grid."""
        return self._by_name(tried, lambda one, name: min(self.try_rates(one, name, grid(name)).values()))

    def _by_name(
        self, tried: Sequence[Candidate], loss: Callable[[Candidate, str], float]
    ) -> dict[str, dict[str, float]]:
        """Return the losses of candidates on all data sets, all at once."""
        cells = [(one, name) for one in tried for name in self.names]
        losses = iter(at_once(lambda cell: loss(*cell), cells))
        return {one.name: {name: next(losses) for name in self.names} for one in tried}

    def join(self, base: Candidate, own: Losses, best: Mapping[str, Losses]) -> tuple[Candidate, list[dict[str, Any]]]:
        """Add parts that are better than the base alone, the best first; return what is left, and every step."""
        steps, winner, least, changed, parts = [], base, own, set[str](), PARTS[base.contender]
        for name in in_order(best, own):
            if name not in parts or over(best[name], own) >= 1 or changed & set(parts[name]):
                continue
            joined = winner.joined(name if winner is base else f"{winner.name} + {name}", parts[name])
            losses = best[name] if winner is base else self.at_own_rates([joined])[joined.name]
            stays = over(losses, least) < 1
            steps.append({"block": joined.name, "loss": losses, "over_base": over(losses, own), "stays": stays})
            if stays:
                winner, least, changed = joined, losses, changed | set(parts[name])
        return winner, steps

    def confirmed(self, base: Candidate, winner: Candidate) -> dict[str, Any]:
        """Return the losses of the winner and of the base with seeds that chose nothing, and their ratios."""
        cells = [(one, name, seed) for one in (base, winner) for name in self.names for seed in CONFIRMING_SEEDS]
        losses = at_once(
            lambda cell: self.loss(cell[0], cell[1], self.own_rates[cell[0].name, cell[1]], 1.0, cell[2]), cells
        )
        half = len(cells) // 2
        rows = [
            {"data": name, "seed": seed, "base": of_base, "loss": loss, "over_base": loss / of_base}
            for (_, name, seed), of_base, loss in zip(cells[:half], losses[:half], losses[half:], strict=True)
        ]
        return {"over_base": statistics.geometric_mean(row["over_base"] for row in rows), "seeds": rows}


def _told(found: Mapping[str, dict[str, float]], base: Losses) -> list[dict[str, Any]]:
    """Return the losses of a round with what they are over the base's, the best first."""
    return [
        {"block": name, "loss": found[name], "over_base": over(found[name], base)} for name in in_order(found, base)
    ]


# -- trainings -------------------------------------------------------------------------------------------------------


class Trainings:
    """Trainings for equal times of the processor, in processes of their own, some of them at once."""

    def __init__(self, tried: Sequence[Candidate], data: Sequence[DataSet], size: str, work: Path, jobs: int) -> None:
        self.data, self.size, self.work = {one.name: one for one in data}, size, work
        self.free = threading.Semaphore(jobs)
        self.base, *others = tried
        self.cells: dict[Path, dict[str, Any]] = {}
        """What was trained, by directory."""
        self.timing = threading.Lock()
        self.times: dict[tuple[str, str], float] = {}
        """Milliseconds of the processor for a training step, by data set and block."""
        for name in self.data:
            self.calibrate(name, others)

    def calibrate(self, name: str, others: Sequence[Candidate]) -> None:
        """Find what a step of the base and of others takes, in turn; of those that are known already, nothing."""
        words = {str(one): self.cell(one, name, CENTRE, 100).arguments(self.size) for one in (self.base, *others)}
        file = self.work / name / f"calibration of {self.base.name}-{self.size}.json"
        found = calibration.calibrated(file, words, SEARCH_ROUNDS, time.process_time, self.data[name].buckets)
        self.times.update({(name, one): ms for one, ms in found.items()})

    def milliseconds(self, one: Candidate, name: str) -> float:
        """Return what a step takes."""
        with self.timing:
            if (name, str(one)) not in self.times:
                self.calibrate(name, [one])
            return self.times[name, str(one)]

    def cell(self, one: Candidate, name: str, rate: float, steps: int, seed: int = SEARCH_SEED) -> Cell:
        """Return a training."""
        return Cell(self.data[name], one.contender, one.setting, rate, steps, seed)

    def loss(self, one: Candidate, name: str, rate: float, share: float, seed: int) -> float:
        """Train a candidate for a share of the data set's seconds, and return its validation loss."""
        with self.free:
            steps = max(1, int(1e3 * share * self.data[name].seconds / self.milliseconds(one, name)))
            cell = self.cell(one, name, rate, steps, seed)
            directory = cell.directory(self.work, self.size)
            found = once(directory / "loss.json", lambda: self._trained(cell, directory))
        self.cells[directory] = {"block": str(one), "data": name, "rate": rate, "steps": steps, "seed": seed, **found}
        return math.inf if found["val_loss"] is None else found["val_loss"]

    def _trained(self, cell: Cell, directory: Path) -> dict[str, Any]:
        metrics = trained(cell, directory, self.size)
        loss = None if metrics is None else metrics["val_loss"]
        print(f"{directory}: loss {'diverged' if loss is None else f'{loss:.4f}'}", flush=True)
        return {"val_loss": loss, "commit": commit(directory / "run")}


def study(
    tried: Sequence[Candidate],
    data: Sequence[DataSet],
    size: str,
    work: Path,
    jobs: int,
    search: Callable[[Search], dict[str, Any]],
) -> dict[str, Any]:
    """Run every training of a search that is not there yet, and return what was found; the base comes first."""
    from benchmarks.measure import CpuDevice, software

    trainings = Trainings(tried, data, size, work, jobs)
    found = search(Search(list(trainings.data), trainings.loss))
    return without_nan(
        {
            "size": size,
            "seeds": [SEARCH_SEED, *CONFIRMING_SEEDS],
            "share_of_time_alone": SHARE,
            "data": {one.name: {"tokens": one.tokens, "seconds": one.seconds} for one in data},
            "parts": {str(one): one.name for one in tried},
            "milliseconds_per_step": {f"{name}, {one}": ms for (name, one), ms in trainings.times.items()},
            **found,
            "cells": [trainings.cells[directory] for directory in sorted(trainings.cells)],
            "machine": CpuDevice().describe(),
            "software": software(),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a search."""
    parser = ArgumentParser(prog="benchmarks.block", description=(__doc__ or "").split("\n")[0])
    add_data_options(parser, tuple(scoring.DATA_SETS), several=True)
    parser.add_argument("--base", choices=tuple(PARTS), default=SCANS, help="the contender whose parts are searched")
    parser.add_argument("--kept", type=int, default=KEPT, help="parts that go on to the second round")
    parser.add_argument(
        "--own-rates", nargs="+", default=[], metavar="PART", help="try these alone, each at a whole grid of rates"
    )
    parser.add_argument("--size", default=Protocol.size, help="preset of all models, such as N or T")
    parser.add_argument("--seconds", nargs="+", default=[], metavar="NAME=S", help="of the processor, for a training")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/block"), help="where the trainings live")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args(arguments)
    check_jobs_and_places(options)
    data = scoring.with_seconds(chosen(options), options.seconds)
    if options.kept < 1:
        raise UserError(f"--kept is {options.kept}, but must be at least 1")
    tried = named(options.base, options.own_rates) if options.own_rates else candidates(options.base)
    for one in tried:
        for each in data:
            fitted(one.contender, one.setting, each, options.size)

    def search(of: Search) -> dict[str, Any]:
        return of.at_all_rates(tried) if options.own_rates else {"kept": options.kept, **of.run(tried, options.kept)}

    publish(
        study(tried, data, options.size, options.work, options.jobs, search), options.out, ("base", "winner", "best")
    )


if __name__ == "__main__":
    run_cli(main)
