"""Plans for images whose planes fit on chip once eight blocks share them: needs compute capability 9.0."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from gspn_dit.ops.cuda.devices import CLUSTER_BLOCKS, Device
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

_COUNTER_BYTES = 16  # of each walk, as in cuda/cluster.cuh
_MOST_WALKS = 8  # side by side


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


def _lines(geometry: Geometry, walks: int) -> int:
    """Lines that a block walks one after the other, with so many walks side by side."""
    lines = 0
    for members in ([code for code in geometry.codes if code < 2], [code for code in geometry.codes if code >= 2]):
        if members:
            steps, count = geometry.segment(members[0])
            lines += steps * -(-len(members) * count // walks)
    return lines


def _launches(geometry: Geometry, device: Device, backward: bool) -> Iterator[Launch]:
    """Yield every shape of block that fits."""
    variant = geometry.variant("cluster", backward)
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    segments = max(geometry.segment(code)[1] for code in geometry.codes)
    for walks, lanes in product(_side_by_side(geometry), lanes_of_blocks(geometry, variant.vector)):
        slab, rows = lanes * variant.vector, thread_rows(lanes, max(_strips(geometry)))
        shared = _shared_bytes(geometry, slab, rows, walks, backward)
        if lanes * rows * walks > most or shared + 1024 > device.shared_bytes:
            continue
        blocks = CLUSTER_BLOCKS * slabs_of(geometry, slab) * geometry.batch
        fields: dict[str, int | tuple[int, ...]] = {
            "slab": slab,
            "slabs": slabs_of(geometry, slab),
            "group_slots": group_slots(geometry, slab),
            "chunk": _own_lines(geometry),
            "merge_blocks": blocks * segments,
        }
        grid, block = (blocks, 1, 1), (lanes, rows, walks)
        yield Launch(variant, variant.kernels[0], grid, block, shared, fields, _lines(geometry, walks))


def plan_cluster(geometry: Geometry, device: Device, backward: bool) -> Plan | None:
    """One launch for all directions, or None where a plane does not fit or the device has no clusters."""

    def ratio(launch: Launch) -> float:
        return _bytes_ratio(geometry, launch.block[0] * launch.variant.vector, backward)

    launches = list(_launches(geometry, device, backward)) if device.clusters else []
    return plan_on_chip("cluster", geometry, device, backward, launches, ratio)
