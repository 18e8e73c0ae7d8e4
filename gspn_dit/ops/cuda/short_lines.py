"""Plans for lines that are short enough for a block to keep an image's plane on chip for all directions."""

from __future__ import annotations

from collections.abc import Iterator

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

_SPARED_GATES = 4  # as in cuda/common.cuh


def _short_shared_bytes(geometry: Geometry, slab: int, rows: int, backward: bool) -> int:
    plane, real, item = geometry.height * geometry.width, geometry.real_bytes, geometry.dtype.itemsize
    if backward:
        return slab * (plane * (2 * real + 2 * item) + 4 * rows * real + _SPARED_GATES * rows * item)
    return slab * (plane * (real + item) + 2 * rows * real)


def _short_blocks(geometry: Geometry, device: Device, backward: bool) -> Iterator[tuple[float, int, int, int]]:
    """Yield (cost, lanes, rows, shared bytes) of every block shape that fits; the cost is in relative time."""
    variant = geometry.variant("short")
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    longest = max(geometry.height, geometry.width)
    if backward and longest > variant.lines:
        return
    for lanes in (32, 16, 8, 4):
        slab, rows = lanes * variant.vector, thread_rows(lanes, longest)
        shared = _short_shared_bytes(geometry, slab, rows, backward)
        if lanes * rows > most or shared + 1024 > device.shared_bytes or splits_sectors(geometry, slab):
            continue
        cost = straddling(geometry.channels, slab, geometry.dtype.itemsize)
        # A lone block cannot load while it computes; too few blocks leave multiprocessors idle.
        cost *= 1.0 if 2 * (shared + 1024) <= device.shared_bytes else 1.05
        cost *= max(1.0, device.processors * BLOCKS_THAT_FILL / (slabs_of(geometry, slab) * geometry.batch))
        yield cost, lanes, rows, shared


def plan_short(geometry: Geometry, device: Device, backward: bool) -> Plan | None:
    shapes = list(_short_blocks(geometry, device, backward))
    if not shapes:
        return None
    _, lanes, rows, shared = min(shapes, key=lambda shape: shape[0])
    variant = geometry.variant("short")
    slab = lanes * variant.vector
    blocks = slabs_of(geometry, slab) * geometry.batch
    fields: dict[str, int | tuple[int, ...]] = {
        "slab": slab,
        "slabs": slabs_of(geometry, slab),
        "group_slots": group_slots(geometry, slab),
        "merge_blocks": blocks,
    }
    kernel = variant.kernels[1 if backward else 0]
    launch = Launch(variant, kernel, (blocks, 1, 1), (lanes, rows, 1), shared, fields)
    ratio = straddling(geometry.channels, slab, geometry.dtype.itemsize)
    if not backward:
        return Plan("short", (launch,), {}, ratio)
    finish, buffers = finish_sums(geometry, slab, blocks)
    return Plan("short", (launch, *finish), buffers, ratio)
