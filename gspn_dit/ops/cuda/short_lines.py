"""Plans for lines that are short enough for a block to keep an image's plane on chip for all directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from gspn_dit.ops.cuda.types import (
    BLOCKS_THAT_FILL,
    Device,
    Geometry,
    Launch,
    Plan,
    finish_sums,
    group_slots,
    slabs_of,
    splits_sectors,
    straddling,
    thread_rows,
)

SPARED_GATES = 4  # as in cuda/common.cuh


@dataclass(frozen=True)
class _Shape:
    """One shape of block that fits, and what it costs in relative time."""

    cost: float
    block: tuple[int, int, int]
    shared_bytes: int


def _shared_bytes(geometry: Geometry, slab: int, rows: int, segments: int, backward: bool) -> int:
    plane, real, item = geometry.height * geometry.width, geometry.real_bytes, geometry.dtype.itemsize
    lines = _state_lines(geometry) + 4 if backward else 2
    own = slab * (lines * (rows + 1) + 1) * real
    if not backward:
        return slab * plane * (real + item) + segments * own
    return slab * plane * (real + 2 * item) + segments * (own + 32 * real + slab * SPARED_GATES * rows * item)


def _state_lines(geometry: Geometry) -> int:
    return max(geometry.segment(code)[0] for code in geometry.codes)


def _shapes(geometry: Geometry, device: Device, backward: bool) -> Iterator[_Shape]:
    variant = geometry.variant("short", backward)
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    longest = max(geometry.height, geometry.width)
    if backward and longest > variant.lines:
        return
    most_segments = max(geometry.segment(code)[1] for code in geometry.codes)
    for lanes, segments in product((32, 16, 8, 4, 2, 1), range(1, min(most_segments, 4) + 1)):
        slab, rows = lanes * variant.vector, thread_rows(lanes, longest)
        shared = _shared_bytes(geometry, slab, rows, segments, backward)
        if lanes * rows * segments > most or shared + 1024 > device.shared_bytes or splits_sectors(geometry, slab):
            continue
        cost = straddling(geometry.channels, slab, geometry.dtype.itemsize)
        # A lone block cannot load while it computes; too few blocks leave multiprocessors idle.
        cost *= 1.0 if 2 * (shared + 1024) <= device.shared_bytes else 1.05
        cost *= max(1.0, device.processors * BLOCKS_THAT_FILL / (slabs_of(geometry, slab) * geometry.batch))
        yield _Shape(cost, (lanes, rows, segments), shared)


def plan_short(geometry: Geometry, device: Device, backward: bool) -> Plan | None:
    """One launch for all directions, or None where a plane does not fit."""
    shapes = list(_shapes(geometry, device, backward))
    if not shapes:
        return None
    shape = min(shapes, key=lambda shape: shape.cost)
    variant = geometry.variant("short", backward)
    slab = shape.block[0] * variant.vector
    blocks = slabs_of(geometry, slab) * geometry.batch
    merge_blocks = blocks * shape.block[2]
    fields: dict[str, int | tuple[int, ...]] = {
        "slab": slab,
        "slabs": slabs_of(geometry, slab),
        "group_slots": group_slots(geometry, slab),
        "chunk": _state_lines(geometry),
        "merge_blocks": merge_blocks,
    }
    launch = Launch(variant, variant.kernels[0], (blocks, 1, 1), shape.block, shape.shared_bytes, fields)
    ratio = geometry.bytes_over_floor(0, backward) * straddling(geometry.channels, slab, geometry.dtype.itemsize)
    if not backward:
        return Plan("short", (launch,), {}, ratio)
    finish, buffers = finish_sums(geometry, slab, merge_blocks)
    return Plan("short", (launch, *finish), buffers, ratio)
