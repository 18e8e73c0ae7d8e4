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

_COUNTER_BYTES = 32  # as in cuda/cluster.cuh


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
    """Yield how many directions may run side by side: two from opposite ends, unless they meet in a line."""
    columns = [code for code in geometry.codes if code < 2]
    rows = [code for code in geometry.codes if code >= 2]
    pairs = [codes for codes in (columns, rows) if len(codes) == 2]
    if pairs and all(geometry.lines_of(codes[0])[0] % 2 == 0 for codes in pairs):
        yield 2
    yield 1


def _shared_bytes(geometry: Geometry, slab: int, rows: int, members: int, backward: bool) -> int:
    strip_rows, strip_columns = _strips(geometry)
    plane, line = CLUSTER_BLOCKS * strip_rows * strip_columns * slab, (rows + 2) * slab
    if not backward:
        return _COUNTER_BYTES + geometry.real_bytes * (plane + members * 2 * line)
    lines = geometry.variant("cluster").lines
    longest = max(geometry.lines_of(code)[0] for code in geometry.codes)
    own = (lines + 4 + (longest - 1) // lines) * line + 32
    return _COUNTER_BYTES + geometry.real_bytes * (plane + members * own)


def _bytes_ratio(geometry: Geometry, slab: int, backward: bool) -> float:
    """Elements moved over the fewest possible: x and grad_y once per direction, and what the states' walk reads."""
    directions, channels = len(geometry.codes), geometry.channels
    extra = (2 if backward else 1) * (directions - 1) * channels
    if backward:
        chunks = (max(geometry.lines_of(code)[0] for code in geometry.codes) - 1) // geometry.variant("cluster").lines
        extra += directions * (2 * channels + 3 * geometry.groups) * chunks // (chunks + 1)
    extra_bytes = extra * geometry.tokens * geometry.dtype.itemsize
    return (1 + extra_bytes / geometry.floor_bytes(backward)) * straddling(channels, slab, geometry.dtype.itemsize)


def _shapes(geometry: Geometry, device: Device, backward: bool) -> Iterator[_Shape]:
    variant = geometry.variant("cluster")
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    for members in _side_by_side(geometry):
        for lanes in (32, 16, 8, 4):
            slab, rows = lanes * variant.vector, thread_rows(lanes, max(_strips(geometry)))
            shared = _shared_bytes(geometry, slab, rows, members, backward)
            if lanes * rows * members > most or shared + 1024 > device.shared_bytes or splits_sectors(geometry, slab):
                continue
            blocks = CLUSTER_BLOCKS * slabs_of(geometry, slab) * geometry.batch
            cost = straddling(geometry.channels, slab, geometry.dtype.itemsize)
            cost *= 1.0 if 2 * (shared + 1024) <= device.shared_bytes else 1.05
            cost *= 1.0 if members == 2 else 1.2  # half as many lines to wait for
            cost *= max(1.0, device.processors * BLOCKS_THAT_FILL / blocks)
            yield _Shape(cost, (lanes, rows, members), slab, shared)


def plan_cluster(geometry: Geometry, device: Device, backward: bool) -> Plan | None:
    """One launch for all directions, or None where a plane does not fit or the device has no clusters."""
    shapes = list(_shapes(geometry, device, backward)) if device.clusters else []
    if not shapes:
        return None
    shape = min(shapes, key=lambda shape: shape.cost)
    variant = geometry.variant("cluster")
    blocks = CLUSTER_BLOCKS * slabs_of(geometry, shape.slab) * geometry.batch
    fields: dict[str, int | tuple[int, ...]] = {
        "slab": shape.slab,
        "slabs": slabs_of(geometry, shape.slab),
        "group_slots": group_slots(geometry, shape.slab),
        "merge_blocks": blocks,
    }
    kernel = variant.kernels[1 if backward else 0]
    launch = Launch(variant, kernel, (blocks, 1, 1), shape.block, shape.shared_bytes, fields)
    ratio = _bytes_ratio(geometry, shape.slab, backward)
    if not backward:
        return Plan("cluster", (launch,), {}, ratio)
    finish, buffers = finish_sums(geometry, shape.slab, blocks)
    return Plan("cluster", (launch, *finish), buffers, ratio)
