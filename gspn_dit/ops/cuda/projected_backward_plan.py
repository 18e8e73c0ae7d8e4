"""How the backward pass of a projected scan is cut into launches of the fused kernels, or why it is not.

Arithmetic on shapes alone, as in `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.projected_plan import (
    MOST_BACKWARD_WARPS,
    WARP_CHANNELS,
    ProjectedGeometry,
    ProjectedPlan,
    pitches,
    refusal,
)
from gspn_dit.ops.cuda.types import Launch, straddling

_MAPS = 5
_MOST_PROXY = 80  # channels of a proxy, the sums of whose weights' gradients fit in the registers of a warp
_WORK = 800.0  # of a block's warps for a token, in the time that an element takes from memory
_CLOSE = 1.1  # times the least: estimates are no better, so that fewer bytes decide
_SLACKS = ((31, 31), (0, 2), (0, 0))  # words that a token of x and of sums takes more, against bank conflicts
_JOIN_WIDTH = 32
_JOIN_SHARES = 4


@dataclass(frozen=True)
class _Cut:
    """How channels and images are cut among blocks, and what that costs."""

    cost: float
    moved: float
    """Elements per token and channel."""
    slab: int
    cluster: int
    parts: int
    shared_bytes: int
    fields: dict[str, int]


def _planes(geometry: ProjectedGeometry, slab: int, slack: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """Bytes of shared memory of a block, and the steps of its planes with so much slack."""
    itemsize, directions, padded = geometry.dtype.itemsize, len(geometry.codes), geometry.padded_proxy
    steps = {
        **pitches(geometry, "proxy", padded, itemsize, run=8, step=4),  # rows of a matrix take 16 bytes at a time
        **pitches(geometry, "x", slab, itemsize, run=4, step=itemsize, slack=slack[0]),
        **pitches(geometry, "sum", slab, 4, run=8, step=2, slack=slack[1]),
        **pitches(geometry, "grad", padded, 4, run=16, step=4),
    }
    elements = geometry.height * (steps["proxy_row"] + 2 * steps["x_row"])
    states = directions * geometry.height * steps["sum_row"]
    sums = geometry.height * steps["grad_row"]
    if geometry.skip:
        states = max(states, directions * slab * padded)  # those of the skip's sums that warps keep aside
        sums += geometry.height * steps["sum_row"] + slab * padded
        elements += slab * padded if itemsize == 2 else 0
    weights = _MAPS * directions * slab * padded * itemsize if itemsize == 2 else 0
    return max(elements * itemsize + 4 * (states + sums), weights), steps


def _slabs(geometry: ProjectedGeometry, device: Device) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Widths of slabs that fit in a block, each with its bytes of shared memory and the steps of its planes."""
    for groups in (8, 4, 2, 1):
        slab = groups * WARP_CHANNELS
        if groups * len(geometry.codes) > MOST_BACKWARD_WARPS or (groups > 1 and slab // 2 >= geometry.channels):
            continue
        for slack in _SLACKS:
            shared, steps = _planes(geometry, slab, slack)
            if shared + 1024 <= device.shared_bytes:
                yield slab, shared, steps
                break


def _cuts(geometry: ProjectedGeometry, device: Device, cut: tuple[int, int] | None) -> Iterator[_Cut]:
    directions, proxy, itemsize = len(geometry.codes), geometry.proxy_channels, geometry.dtype.itemsize
    wide = 4 / itemsize  # elements of a float32, which is written once and read once
    for slab, shared, steps in _slabs(geometry, device):
        # In elements per token and channel: of one block's weights and their gradients, and of each image.
        flush = _MAPS * directions * proxy * (1 + 2 * wide) / (geometry.height * geometry.width)
        tokens = 3 * straddling(geometry.channels, slab, itemsize) + proxy / slab
        for cluster in (cut[0],) if cut else (8, 4, 2, 1) if device.clusters else (1,):
            spans = -(-geometry.channels // (slab * cluster))
            if cluster > 1 and slab * (cluster - 1) >= geometry.channels and cut is None:
                continue
            moved = tokens + 2 * wide * proxy / (slab * cluster)
            at_once = device.at_once(1, cluster) // cluster
            for parts in (cut[1],) if cut else range(1, geometry.batch + 1):
                turns = -(-spans * parts // at_once)
                cost = turns * (-(-geometry.batch // parts) * (_WORK + moved * slab) + flush * slab)
                all_moved = moved + flush * parts / geometry.batch
                yield _Cut(cost, all_moved, slab, cluster, parts, shared, steps)


def _joins(geometry: ProjectedGeometry, fields: dict[str, int | tuple[int, ...]]) -> Iterator[Launch]:
    """One launch for each kind of result."""
    directions, proxy, groups = len(geometry.codes), geometry.proxy_channels, geometry.groups
    gates = directions * geometry.channels * proxy
    results = [geometry.tokens * proxy, 3 * directions * groups * proxy, gates, gates]
    results += [geometry.channels * proxy if geometry.skip else 0, directions]
    variant = geometry.variant("projected_join")
    for job, count in enumerate(results):
        if count:
            grid, block = (-(-count // _JOIN_WIDTH), 1, 1), (_JOIN_WIDTH, _JOIN_SHARES, 1)
            yield Launch(variant, variant.kernels[0], grid, block, 0, {**fields, "job": job})


@lru_cache(maxsize=512)
def plan_backward(
    geometry: ProjectedGeometry, device: Device, cut: tuple[int, int] | None = None
) -> ProjectedPlan | str:
    """Return the launches of the backward pass, or in one line why the fused kernels do not take it.

    `cut` forces how many blocks are a cluster, and among how many the images of a slab are shared.
    """
    if (reason := refusal(geometry, device, _MOST_PROXY, 1)) is not None:
        return reason
    cuts = list(_cuts(geometry, device, cut))
    if not cuts:
        return f"images of {geometry.height}×{geometry.width} do not fit in the shared memory of a block"
    least = min(cut.cost for cut in cuts)
    best = min((cut for cut in cuts if cut.cost <= _CLOSE * least), key=lambda cut: (cut.moved, cut.cost))
    directions, channels, proxy = len(geometry.codes), geometry.channels, geometry.proxy_channels
    spans = -(-channels // (best.slab * best.cluster))
    slabs, groups = spans * best.cluster, best.slab // WARP_CHANNELS
    # Opposite directions would be at the middle of an odd number of lines together: one of them waits a step.
    lines = [geometry.width if code < 2 else geometry.height for code in geometry.codes]
    steps = max(count + code % 2 * (count % 2) for code, count in zip(geometry.codes, lines))
    orientations = len({code < 2 for code in geometry.codes})
    fields: dict[str, int | tuple[int, ...]] = {
        **{"slab": best.slab, "slabs": slabs, "parts": best.parts, "spans": spans},
        **{"slots": orientations * groups, "steps": steps, "group_bits": groups.bit_length() - 1},
        **best.fields,
    }
    variant = geometry.variant("projected_backward", best.cluster)
    block = (32, groups * directions, 1)
    first = Launch(variant, variant.kernels[0], (slabs, best.parts, 1), block, best.shared_bytes, fields)
    buffers = {
        "proxy_sums": spans * geometry.tokens * geometry.padded_proxy,
        "weight_sums": best.parts * _MAPS * directions * channels * proxy,
        "skip_sums": best.parts * channels * proxy if geometry.skip else 0,
        "merge_sums": best.parts * slabs * groups * directions,
    }
    return ProjectedPlan((first, *_joins(geometry, fields)), buffers)
