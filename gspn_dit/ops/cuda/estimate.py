"""How long a launch takes at least: what it moves, what it issues, and how long its lines wait for each other.

Blocks run in waves, as many at a time as a device holds, and a wave takes as long as the slowest of memory, issue,
special functions and waiting. Plans are chosen by this, and `gspn_dit.ops.inspect` prints it. A model, to compare
kernels and shapes by; no GPU has confirmed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.types import Launch, Variant

BLOCKS_THAT_FILL = 0.7  # share of the multiprocessors that can draw the whole bandwidth
ISSUE_PER_CLOCK = 4  # instructions of warps, per multiprocessor
SPECIAL_LANES_PER_CLOCK = 16  # powers and reciprocals, per multiprocessor
STEP_CLOCKS = 150
"""From one barrier to the next, of a block alone: shared memory read, some dozen dependent operations, written."""
LAUNCH_MS = 0.006
"""From one launch to the next of the same stream, where plans differ in how many they take."""
_ALONE = 1.05  # times as long: a block that has a multiprocessor to itself cannot load while it waits
_CLOSE = 1.25  # times the least: estimates are no better, so that fewer bytes decide
_ALIKE = 1.04  # times the least sum of bounds, where bytes are the same


@dataclass(frozen=True)
class LineCost:
    """What a kernel takes for one line of a walk there and, in a backward kernel, back."""

    instructions: float
    """Of a warp."""
    special: float
    """Of those, powers and reciprocals."""
    steps: int
    """Barriers that a line passes in all walks."""
    registers: int
    """Of a thread."""


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of launches one after the other, had they no other limit."""

    bytes_ms: float | None
    """At the bandwidth that the blocks of each wave can draw; None where the bytes are not known."""
    issue_ms: float | None
    """At one instruction per clock and scheduler; None where the machine code is not read."""
    special_ms: float | None
    """Powers and reciprocals at the rate of their units."""
    latency_ms: float | None
    """Lines one after the other, of one wave of blocks after the other."""
    waves: float
    """Blocks over those that run at once, of the launch that has most; less than one leaves room."""

    @property
    def _bounds(self) -> dict[str, float]:
        bounds = {name: getattr(self, f"{name}_ms") for name in ("bytes", "issue", "special", "latency")}
        return {name: value for name, value in bounds.items() if value is not None}

    @property
    def bound(self) -> str | None:
        """Name of the largest, which the launches take at least: "bytes", "issue", "special" or "latency"."""
        return max(self._bounds, key=self._bounds.__getitem__, default=None)

    @property
    def milliseconds(self) -> float | None:
        """The largest; None where the bytes are not known."""
        return None if self.bytes_ms is None else max(self._bounds.values())

    @property
    def sum_ms(self) -> float:
        """All of them: by this, plans are compared whose largest are alike."""
        return sum(self._bounds.values())

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other."""

        def both(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return Estimate(
            both(self.bytes_ms, other.bytes_ms),
            both(self.issue_ms, other.issue_ms),
            both(self.special_ms, other.special_ms),
            both(self.latency_ms, other.latency_ms),
            max(self.waves, other.waves),
        )


def estimate(launch: Launch, device: Device, cost: LineCost | None, resident: int, moved: float | None) -> Estimate:
    """Estimate one launch that moves so many bytes, where a multiprocessor holds `resident` of its blocks at once.

    Without the cost of its lines their bounds are None.
    """
    at_once = device.at_once(resident, launch.variant.cluster_blocks)
    full, rest = divmod(launch.blocks, at_once)

    def in_waves(milliseconds: Callable[[int], float]) -> float:
        return full * milliseconds(at_once) + (milliseconds(rest) if rest else 0.0)

    def memory(moved: float) -> float:
        def of(blocks: int) -> float:
            drawn = min(1.0, blocks / (BLOCKS_THAT_FILL * device.processors))
            return moved * blocks / launch.blocks / (device.bandwidth_gbs * 1e6 * drawn)

        return in_waves(of)

    bytes_ms = None if moved is None else memory(moved)
    waves = launch.blocks / at_once
    if cost is None:
        return Estimate(bytes_ms, None, None, None, waves)
    per_ms, warp_lines = device.clock_ghz * 1e6, -(-launch.threads // 32) * launch.lines

    def busiest(each: float, per_clock: int) -> float:
        """Milliseconds where every block takes so many turns of units of which a multiprocessor has some."""
        return in_waves(lambda blocks: -(-blocks // device.processors) * each / (per_clock * per_ms))

    return Estimate(
        bytes_ms,
        busiest(warp_lines * cost.instructions, ISSUE_PER_CLOCK),
        busiest(warp_lines * cost.special * 32, SPECIAL_LANES_PER_CLOCK),
        in_waves(lambda blocks: launch.lines * cost.steps * STEP_CLOCKS / per_ms),
        waves,
    )


def estimate_all(
    launches: Iterable[Launch], device: Device, cost: LineCost | None, resident: int, moved: float | None
) -> Estimate:
    """The same of launches of one kernel one after the other, which share what is moved by their blocks."""
    runs = list(launches)
    blocks = sum(launch.blocks for launch in runs)
    parts = (
        estimate(run, device, cost, resident, None if moved is None else moved * run.blocks / blocks) for run in runs
    )
    return reduce(Estimate.__add__, parts)


# What `gspn_dit.ops.inspect` reads from the machine code of sm_90, which a plan cannot wait for: instructions of a warp
# for one line per channel of a thread, powers and reciprocals among them, and barriers.
_LINES: dict[tuple[str, str], tuple[float, float, int]] = {
    ("short", "forward"): (52, 4, 1),
    ("short", "backward"): (176, 9, 2),
    ("cluster", "forward"): (63, 4, 1),
    ("cluster", "backward"): (315, 13, 3),
    ("wide", "forward"): (96, 4, 1),
    ("wide", "states"): (85, 4, 1),
    ("wide", "backward"): (220, 9, 2),
    ("long", "forward"): (77, 4, 1),
    ("long", "states"): (64, 4, 1),
    ("long", "backward"): (170, 9, 2),
}
# Times as many, by bytes of an element: exponentials of float32 are longer, and those of float64 take other units.
_OF_STORAGE = {2: (1.0, 1.0), 4: (1.5, 1.0), 8: (5.0, 0.3)}


def planned_cost(variant: Variant, kernel: str) -> LineCost:
    """What a kernel is taken to cost before it is compiled; as many registers as its largest block leaves room for."""
    backward = "backward" in kernel
    instructions, special, steps = _LINES[variant.regime, kernel.split("_")[2]]
    more, more_special = _OF_STORAGE[variant.dtype.itemsize]
    registers = min(255, 65536 // (variant.backward_threads if backward else variant.forward_threads))
    channels = variant.vector
    return LineCost(channels * more * instructions, channels * more_special * special, steps, registers)


@dataclass(frozen=True)
class Score:
    """By what ways to run a pass are compared."""

    milliseconds: float
    moved: float
    """Bytes."""
    sum_ms: float
    """Of all bounds, by which those compare whose largest are alike."""

    def __add__(self, other: Score) -> Score:
        """One after the other."""
        return Score(self.milliseconds + other.milliseconds, self.moved + other.moved, self.sum_ms + other.sum_ms)


def score(launch: Launch, device: Device, moved: float, times: int = 1) -> Score:
    """Score so many launches like this one, which together move so many bytes."""
    cost = planned_cost(launch.variant, launch.kernel)
    resident = device.resident(cost.registers, launch.threads, launch.shared_bytes)
    one = estimate(launch, device, cost, resident, moved / times)
    assert one.milliseconds is not None
    more = times * (_ALONE if resident < 2 else 1.0)
    return Score(more * one.milliseconds + times * LAUNCH_MS, moved, more * one.sum_ms)


Way = TypeVar("Way")


def best(ways: Sequence[Way], score_of: Callable[[Way], Score]) -> Way:
    """Of those that are about as fast as the fastest the one that moves the fewest bytes; of several, the first."""
    scored = [(score_of(way), way) for way in ways]

    def least(of: Callable[[Score], float], times: float) -> list[tuple[Score, Way]]:
        limit = times * min(of(score) for score, _ in scored)
        return [(score, way) for score, way in scored if of(score) <= limit]

    scored = least(lambda score: score.milliseconds, _CLOSE)
    scored = least(lambda score: score.moved, 1.001)
    scored = least(lambda score: score.sum_ms, _ALIKE)
    return scored[0][1]
