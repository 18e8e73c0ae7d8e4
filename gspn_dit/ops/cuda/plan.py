"""How a scan is cut into launches of the kernels in `cuda/`: which regime, which blocks, which buffers.

Everything here is arithmetic on shapes, so that the same plan drives CuPy on a GPU, the kernels' build for the host in
the tests, and `python -m gspn_dit.ops.inspect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from gspn_dit.ops.cuda.cluster_lines import plan_cluster
from gspn_dit.ops.cuda.long_lines import plan_long
from gspn_dit.ops.cuda.short_lines import plan_short
from gspn_dit.ops.cuda.types import Device, Geometry, Plan

_ON_CHIP = {"short": plan_short, "cluster": plan_cluster}


@lru_cache(maxsize=512)
def plan(geometry: Geometry, device: Device, backward: bool, regime: str | None = None) -> Plan:
    """Return the launches of a pass: short lines where a plane fits in a block or clusters where it fits in eight,
    whichever moves fewer bytes, else long lines; `regime` forces one of "short", "cluster" and "long".

    Raises ValueError where the forced regime cannot run.
    """
    tried = [choose(geometry, device, backward) for name, choose in _ON_CHIP.items() if regime in (None, name)]
    plans = [found for found in tried if found is not None]
    if plans:
        return min(plans, key=lambda found: found.bytes_ratio)
    if regime in _ON_CHIP:
        raise ValueError(f"lines of {geometry.height}×{geometry.width} do not fit the {regime}-line kernels")
    return plan_long(geometry, device, backward)


def alignment_of(addresses: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Largest power of two, up to 8 elements, that divides every stride (in elements) and every address."""
    result = 8
    for value in (*strides, *(address // itemsize if address % itemsize == 0 else 1 for address in addresses)):
        while value % result:
            result //= 2
    return result
