"""How a scan is cut into launches of the kernels in `cuda/`: which regime, which blocks, which buffers.

Everything here is arithmetic on shapes, so that the same plan drives CuPy on a GPU, the kernels' build for the host in
the tests, and `python -m gspn_dit.ops.inspect`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from gspn_dit.ops.cuda.cluster_lines import plan_cluster
from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.long_lines import plan_long
from gspn_dit.ops.cuda.short_lines import plan_short
from gspn_dit.ops.cuda.types import Geometry, Plan

MOST_CELLS = 2**32 - 1
"""Tokens times directions that `Cell` in cuda/common.cuh counts."""

_PLANNERS: dict[str, Callable[[Geometry, Device, bool], Plan | None]] = {
    "short": plan_short,
    "cluster": plan_cluster,
    "wide": partial(plan_long, regime="wide"),
    "long": plan_long,
}


@lru_cache(maxsize=512)
def plan(geometry: Geometry, device: Device, backward: bool, regime: str | None = None) -> Plan:
    """Return the launches of a pass: short lines where a plane fits in a block or clusters where it fits in eight,
    whichever moves fewer bytes, else wide lines where clusters hold a line, else long ones; `regime` forces one of
    "short", "cluster", "wide" and "long".

    Raises ValueError where the forced regime cannot run, and for more tokens than kernels count.
    """
    cells = geometry.tokens * len(geometry.codes)
    if cells > MOST_CELLS:
        raise ValueError(f"{cells} tokens of all directions, but one call takes at most {MOST_CELLS}: split the batch")
    names = _PLANNERS if regime is None else (regime,)
    found = {name: todo for name in names if (todo := _PLANNERS[name](geometry, device, backward)) is not None}
    if not found:
        raise ValueError(f"lines of {geometry.height}×{geometry.width} do not fit the {regime}-line kernels")
    on_chip = [todo for name, todo in found.items() if name in ("short", "cluster")]
    if on_chip:
        return min(on_chip, key=lambda todo: todo.bytes_ratio)
    return next(iter(found.values()))


def alignment_of(addresses: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Largest power of two, up to 8 elements, that divides every stride (in elements) and every address."""
    result = 8
    for value in (*strides, *(address // itemsize if address % itemsize == 0 else 1 for address in addresses)):
        while value % result:
            result //= 2
    return result
