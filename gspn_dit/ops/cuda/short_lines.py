"""Plans for lines that are short enough for a block to keep an image's plane on chip for all directions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.on_chip import plan_on_chip
from gspn_dit.ops.cuda.types import (
    Geometry,
    Launch,
    Plan,
    group_slots,
    lanes_of_blocks,
    slabs_of,
    straddling,
    thread_rows,
)

SPARED_GATES = 4  # as in cuda/common.cuh


def _shared_bytes(geometry: Geometry, slab: int, rows: int, segments: int, backward: bool) -> int:
    plane, real, item = geometry.height * geometry.width, geometry.real_bytes, geometry.dtype.itemsize
    lines = _state_lines(geometry) + 4 if backward else 2
    own = slab * (lines * (rows + 1) + 1) * real
    if not backward:
        return slab * plane * (real + item) + segments * own
    return slab * plane * (real + 2 * item) + segments * (own + 32 * real + slab * SPARED_GATES * rows * item)


def _state_lines(geometry: Geometry) -> int:
    return max(geometry.segment(code)[0] for code in geometry.codes)


def _launches(geometry: Geometry, device: Device, backward: bool) -> Iterator[Launch]:
    """Yield every shape of block that fits."""
    variant = geometry.variant("short", backward)
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    longest = max(geometry.height, geometry.width)
    if backward and longest > variant.lines:
        return
    segments = [geometry.segment(code) for code in geometry.codes]
    most_segments = max(count for _, count in segments)
    for lanes, side_by_side in product(lanes_of_blocks(geometry, variant.vector), range(1, min(most_segments, 4) + 1)):
        slab, rows = lanes * variant.vector, thread_rows(lanes, longest)
        shared = _shared_bytes(geometry, slab, rows, side_by_side, backward)
        if lanes * rows * side_by_side > most or shared + 1024 > device.shared_bytes:
            continue
        blocks = slabs_of(geometry, slab) * geometry.batch
        fields: dict[str, int | tuple[int, ...]] = {
            "slab": slab,
            "slabs": slabs_of(geometry, slab),
            "group_slots": group_slots(geometry, slab),
            "chunk": _state_lines(geometry),
            "merge_blocks": blocks * side_by_side,
        }
        lines = sum(steps * -(-count // side_by_side) for steps, count in segments)
        yield Launch(variant, variant.kernels[0], (blocks, 1, 1), (lanes, rows, side_by_side), shared, fields, lines)


def plan_short(geometry: Geometry, device: Device, backward: bool) -> Plan | None:
    """One launch for all directions, or None where a plane does not fit."""

    def ratio(launch: Launch) -> float:
        slab = launch.block[0] * launch.variant.vector
        return geometry.bytes_over_floor(0, backward) * straddling(geometry.channels, slab, geometry.dtype.itemsize)

    return plan_on_chip("short", geometry, device, backward, list(_launches(geometry, device, backward)), ratio)
