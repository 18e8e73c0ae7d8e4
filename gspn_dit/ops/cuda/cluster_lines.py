"""Plans for images whose planes fit on chip once eight blocks share them: needs compute capability 9.0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspn_dit.ops.cuda.types import (
    BLOCKS_THAT_FILL,
    CLUSTER_BLOCKS,
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

_COUNTER_BYTES = 16  # of each walk, as in cuda/cluster.cuh
_MOST_WALKS = 8  # side by side


@dataclass(frozen=True)
class _Shape:
    """One shape of block that fits, and what it costs in relative time."""

    cost: float
    block: tuple[int, int, int]
    slab: int
    shared_bytes: int


def _strips(geometry: Geometry) -> tuple[int, int]:
    """Rows and columns of the image per block."""
    return -(-geometry.height // CLUSTER_BLOCKS), -(-geometry.width // CLUSTER_BLOCKS)


def _side_by_side(geometry: Geometry) -> Iterator[int]:
    """Yield how many segments of directions may run side by side, unless two from opposite ends meet in a line."""
    walks, may = 1, True
    for codes in ([code for code in geometry.codes if code < 2], [code for code in geometry.codes if code >= 2]):
        if codes:
            steps, segments = geometry.segment(codes[0])
            walks = max(walks, len(codes) * segments)
            last = geometry.lines_of(codes[0])[0] - (segments - 1) * steps
            may = may and (len(codes) == 1 or (steps % 2 == 0 and last % 2 == 0))
    yield from range(min(walks, _MOST_WALKS) if may else 1, 0, -1)


def _own_lines(geometry: Geometry) -> int:
    """Lines of states of each walk of a backward pass: those of a chunk, and the ends of all chunks but the last."""
    lines = geometry.variant("cluster", True).lines
    return lines + (max(geometry.segment(code)[0] for code in geometry.codes) - 1) // lines


def _shared_bytes(geometry: Geometry, slab: int, rows: int, walks: int, backward: bool) -> int:
    strip_rows, strip_columns = _strips(geometry)
    plane, line = CLUSTER_BLOCKS * strip_rows * strip_columns * slab, (rows + 2) * slab
    own = (_own_lines(geometry) + 4) * line + 32 if backward else 2 * line
    return _COUNTER_BYTES * walks + geometry.real_bytes * (plane + walks * own)


def _bytes_ratio(geometry: Geometry, slab: int, backward: bool) -> float:
    """Elements moved over the fewest possible: x and grad_y once per direction, and what the states' walk reads."""
    directions, channels = len(geometry.codes), geometry.channels
    extra: float = (2 if backward else 1) * (directions - 1) * channels
    if backward:
        chunks = _own_lines(geometry) - geometry.variant("cluster", True).lines
        walked = directions * (2 * channels + 3 * geometry.groups) - geometry.unread_logits()
        extra += walked * chunks / (chunks + 1)
    return geometry.bytes_over_floor(extra, backward) * straddling(channels, slab, geometry.dtype.itemsize)


def _shapes(geometry: Geometry, device: Device, backward: bool) -> Iterator[_Shape]:
    variant = geometry.variant("cluster", backward)
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    for walks in _side_by_side(geometry):
        for lanes in (32, 16, 8, 4, 2, 1):
            slab, rows = lanes * variant.vector, thread_rows(lanes, max(_strips(geometry)))
            shared = _shared_bytes(geometry, slab, rows, walks, backward)
            if lanes * rows * walks > most or shared + 1024 > device.shared_bytes or splits_sectors(geometry, slab):
                continue
            blocks = CLUSTER_BLOCKS * slabs_of(geometry, slab) * geometry.batch
            cost = straddling(geometry.channels, slab, geometry.dtype.itemsize)
            cost *= 1.0 if 2 * (shared + 1024) <= device.shared_bytes else 1.05
            cost *= 1 + 0.4 / walks  # fewer lines to wait for
            cost *= max(1.0, device.processors * BLOCKS_THAT_FILL / blocks)
            yield _Shape(cost, (lanes, rows, walks), slab, shared)


def plan_cluster(geometry: Geometry, device: Device, backward: bool) -> Plan | None:
    """One launch for all directions, or None where a plane does not fit or the device has no clusters."""
    shapes = list(_shapes(geometry, device, backward)) if device.clusters else []
    if not shapes:
        return None
    shape = min(shapes, key=lambda shape: shape.cost)
    variant = geometry.variant("cluster", backward)
    blocks = CLUSTER_BLOCKS * slabs_of(geometry, shape.slab) * geometry.batch
    segments = max(geometry.segment(code)[1] for code in geometry.codes)
    fields: dict[str, int | tuple[int, ...]] = {
        "slab": shape.slab,
        "slabs": slabs_of(geometry, shape.slab),
        "group_slots": group_slots(geometry, shape.slab),
        "chunk": _own_lines(geometry),
        "merge_blocks": blocks * segments,
    }
    launch = Launch(variant, variant.kernels[0], (blocks, 1, 1), shape.block, shape.shared_bytes, fields)
    ratio = _bytes_ratio(geometry, shape.slab, backward)
    if not backward:
        return Plan("cluster", (launch,), {}, ratio)
    finish, buffers = finish_sums(geometry, shape.slab, blocks * segments)
    return Plan("cluster", (launch, *finish), buffers, ratio)
