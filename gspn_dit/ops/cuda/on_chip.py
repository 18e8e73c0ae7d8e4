"""Plans of one launch for all directions: what short lines and clusters share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.estimate import Score, best, score
from gspn_dit.ops.cuda.types import Geometry, Launch, Plan, finish_sums


def plan_on_chip(
    regime: str,
    geometry: Geometry,
    device: Device,
    backward: bool,
    launches: Sequence[Launch],
    ratio: Callable[[Launch], float],
) -> Plan | None:
    """The best of the launches, and the sums that end a backward pass; None where there is none.

    `ratio` is what a launch moves over the fewest bytes possible.
    """
    if not launches:
        return None
    floor = geometry.floor_bytes(backward)

    def score_of(launch: Launch) -> Score:
        return score(launch, device, ratio(launch) * floor)

    chosen = best(launches, score_of)
    if not backward:
        return Plan(regime, (chosen,), {}, ratio(chosen))
    slab, merge_blocks = chosen.fields["slab"], chosen.fields["merge_blocks"]
    assert isinstance(slab, int) and isinstance(merge_blocks, int)
    finish, buffers = finish_sums(geometry, slab, merge_blocks)
    return Plan(regime, (chosen, *finish), buffers, ratio(chosen))
