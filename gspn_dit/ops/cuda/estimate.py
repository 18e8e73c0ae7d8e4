"""How long a kernel takes at least: what it moves, what it issues, and how long its lines wait for each other.

A model, to compare kernels and shapes by; no GPU has confirmed it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gspn_dit.ops.cuda.projected_plan import ProjectedGeometry
from gspn_dit.ops.cuda.sass import Code
from gspn_dit.ops.cuda.types import Geometry, Launch

ISSUE_PER_CLOCK = 4  # instructions of warps, per multiprocessor
SPECIAL_LANES_PER_CLOCK = 16  # powers and reciprocals, per multiprocessor
STEP_CLOCKS = 150
"""From one barrier to the next, of a block alone: shared memory read, some dozen dependent operations, written."""


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of all launches of one kernel, had it no other limit."""

    bytes_ms: float | None
    """At the memory's whole bandwidth; None where the bytes are not known."""
    issue_ms: float | None
    """At one instruction per clock and scheduler; None where the machine code is not read."""
    special_ms: float | None
    """Powers and reciprocals at the rate of their units."""
    latency_ms: float | None
    """Lines one after the other, of one wave of blocks after the other."""

    @property
    def bound(self) -> str | None:
        """Name of the largest, which the kernel takes at least: "bytes", "issue", "special" or "latency"."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return max(known, key=lambda name: known[name]).removesuffix("_ms") if known else None

    @property
    def milliseconds(self) -> float | None:
        """The largest; None where the bytes are not known."""
        return None if self.bytes_ms is None else max(value for value in vars(self).values() if value is not None)


def lines_in_turn(launch: Launch, geometry: Geometry) -> int:
    """Lines that a block of a launch walks one after the other, the way back not counted; 0 where it walks none."""
    regime, codes = launch.variant.regime, geometry.codes
    if regime == "finish":
        return 0
    if regime == "short":
        segments = [geometry.segment(code) for code in codes]
        return sum(steps * math.ceil(count / launch.block[2]) for steps, count in segments)
    if regime == "cluster":
        lines = 0
        for members in ([code for code in codes if code < 2], [code for code in codes if code >= 2]):
            if members:
                steps, count = geometry.segment(members[0])
                lines += steps * math.ceil(len(members) * count / launch.block[2])
        return lines
    chunk, span, directions = (launch.fields[name] for name in ("chunk", "span", "phase_direction"))
    assert isinstance(chunk, int) and isinstance(span, int) and isinstance(directions, tuple)
    return min(chunk * span, geometry.segment(codes[directions[0]])[0])


def estimate(
    launches: Sequence[Launch],
    geometry: Geometry | ProjectedGeometry,
    code: Code | None,
    moved_bytes: float | None,
    *,
    resident: int,
    processors: int,
    bandwidth_gbs: float,
    clock_ghz: float,
) -> Estimate:
    """Estimate the launches of one kernel on a device that holds `resident` of its blocks at once."""
    bytes_ms = None if moved_bytes is None else moved_bytes / bandwidth_gbs / 1e6
    if code is None or not isinstance(geometry, Geometry):
        return Estimate(bytes_ms, None, None, None)
    warp_lines = clocks = 0.0
    for launch in launches:
        blocks, lines = math.prod(launch.grid), lines_in_turn(launch, geometry)
        warp_lines += blocks * math.ceil(math.prod(launch.block) / 32) * lines
        clocks += lines * code.steps * STEP_CLOCKS * math.ceil(blocks / resident)
    per_clock = clock_ghz * 1e6 * processors
    issued = warp_lines * sum(code.instructions.values())
    special = warp_lines * code.instructions.get("special", 0.0) * 32
    return Estimate(
        bytes_ms,
        issued / (per_clock * ISSUE_PER_CLOCK),
        special / (per_clock * SPECIAL_LANES_PER_CLOCK),
        clocks / (clock_ghz * 1e6),
    )
