"""Plans for long lines: directions two by two, sums over directions through memory.

The blocks of a cluster share a line where they can hold it ("wide"); else lines are cut into tiles of positions with
halos, and a launch walks one chunk of lines ("long").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gspn_dit.ops.cuda.types import (
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

_BANDWIDTH_BYTES_PER_MICROSECOND = 3.0e6
_LAUNCH_MICROSECONDS = 6.0
_FORWARD_CHUNKS = (4, 8, 16, 32, 64, 1 << 30)  # lines per launch
_BACKWARD_CHUNKS = (2, 4, 6, 8, 12, 16)
_COUNTER_BYTES = 16  # as in cuda/long_lines.cu, where blocks are in clusters
_PATIENCE = {False: 1.2, True: 2.0}  # how much more time fewer bytes may take; the latter if lines stay whole


@dataclass(frozen=True)
class _Phase:
    """Directions of one orientation, which run side by side, and how their lines are cut."""

    members: tuple[int, ...]
    positions: int
    segments: int
    owned: int
    halo: int
    tiles: int
    chunk: int
    chunks: int

    def moved(self) -> float:
        """Positions read over positions owned, and states that cross launches: what the cut adds to the bytes."""
        return (self.positions + 2 * self.halo * (self.tiles - 1)) / self.positions + 0.1 / self.chunk

    def spans(self) -> list[tuple[int, int]]:
        """First chunk and number of chunks of each launch, in the order of a forward pass.

        Where blocks own whole lines they walk many chunks at once, up to where two directions would meet.
        """
        if self.halo:
            return [(step, 1) for step in range(self.chunks)]
        span = self.chunks // len(self.members)
        return [(step, span) for step in range(0, self.chunks, span)]

    def blocks(self, geometry: Geometry, slab: int) -> int:
        return slabs_of(geometry, slab) * self.tiles * self.segments * geometry.batch


def _phases(geometry: Geometry) -> list[tuple[int, ...]]:
    columns = tuple(d for d, code in enumerate(geometry.codes) if code < 2)
    rows = tuple(d for d, code in enumerate(geometry.codes) if code >= 2)
    return [members for members in (columns, rows) if members]


def _cut(geometry: Geometry, members: tuple[int, ...], rows: int, chunk: int, regime: str) -> _Phase | None:
    """Cut lines into chunks of at most `chunk` lines and tiles of at most `rows` positions, halo included.

    Chunks are even in number: two directions that meet in one chunk would add to the same sums at the same time.
    """
    lines, positions = geometry.lines_of(geometry.codes[members[0]])
    length = min(geometry.window, lines) if geometry.window else lines
    chunks = -(-length // chunk)
    chunks += chunks % 2
    chunk = -(-length // chunks)
    segments = -(-lines // length)
    if regime == "wide":
        owned = -(-positions // CLUSTER_BLOCKS)
        return _Phase(members, positions, segments, owned, 0, CLUSTER_BLOCKS, chunk, chunks)
    if positions <= rows:
        return _Phase(members, positions, segments, positions, 0, 1, chunk, chunks)
    owned = rows - 2 * chunk
    if owned < 1:
        return None
    return _Phase(members, positions, segments, owned, chunk, -(-positions // owned), chunk, chunks)


@dataclass(frozen=True)
class _Cut:
    """One way to run a phase: thread rows per block, and what a simple model says of it."""

    phase: _Phase
    rows: int
    lanes: int
    bytes: float
    microseconds: float
    fills: bool
    """Whether there is a block for every multiprocessor."""


def _weigh(
    geometry: Geometry, device: Device, phase: _Phase, rows: int, lanes: int, backward: bool, regime: str
) -> _Cut:
    """Bytes, and time as bytes over the bandwidth that so many blocks can draw plus the launches."""
    slab = lanes * geometry.variant(regime, backward).vector
    moved = geometry.floor_bytes(backward) * (1.9 if backward else 1.7) * len(phase.members) / len(geometry.codes)
    moved *= phase.moved() * straddling(geometry.channels, slab, geometry.dtype.itemsize)
    blocks = phase.blocks(geometry, slab) * len(phase.members)
    share = min(1.0, blocks / device.processors)
    launches = len(phase.spans()) * (2 if backward else 1)
    time = moved / (_BANDWIDTH_BYTES_PER_MICROSECOND * share) + launches * _LAUNCH_MICROSECONDS
    return _Cut(phase, rows, lanes, moved, time, blocks >= device.processors)


def _long_shared_bytes(geometry: Geometry, slab: int, rows: int, chunk: int | None) -> int:
    """Shared memory of the forward kernels, or with `chunk` lines of the backward kernel."""
    real, line = geometry.real_bytes, slab * (rows + 2)
    if chunk is None:
        return _COUNTER_BYTES + line * 2 * real
    stored = slab * rows * chunk * 5 * geometry.dtype.itemsize
    return _COUNTER_BYTES + (line * (chunk + 1 + 4) + 32) * real + stored


def _cuts(
    geometry: Geometry, device: Device, members: tuple[int, ...], lanes: int, backward: bool, regime: str
) -> Iterator[_Cut]:
    """Yield every way to cut the lines of one phase that fits the device."""
    variant = geometry.variant(regime, backward)
    most = min(device.threads, variant.backward_threads if backward else variant.forward_threads)
    positions = geometry.lines_of(geometry.codes[members[0]])[1]
    if regime == "wide":
        heights = {thread_rows(lanes, -(-positions // CLUSTER_BLOCKS))}
    else:
        heights = {most // lanes, most // lanes // 2, most // lanes // 4, thread_rows(lanes, positions)}
    for rows in sorted(heights):
        if rows < 1 or lanes * rows > most or (lanes * rows) % 32:
            continue
        for chunk in _BACKWARD_CHUNKS if backward else _FORWARD_CHUNKS:
            phase = _cut(geometry, members, rows, chunk, regime)
            if phase is None:
                continue
            shared = _long_shared_bytes(geometry, lanes * variant.vector, rows, phase.chunk if backward else None)
            if shared + 1024 <= device.shared_bytes:
                yield _weigh(geometry, device, phase, rows, lanes, backward, regime)


def _best(ways: Sequence[tuple[_Cut, ...]]) -> tuple[_Cut, ...]:
    """Fewest bytes first: the model of time is too coarse to give up many bytes for a small gain.

    Lines that are cut anyway are cut until the blocks fill the device.
    """

    def time(way: tuple[_Cut, ...]) -> float:
        return sum(cut.microseconds for cut in way)

    def whole(way: tuple[_Cut, ...]) -> bool:
        return all(cut.phase.halo == 0 for cut in way)

    def idles(way: tuple[_Cut, ...]) -> bool:
        return not whole(way) and not all(cut.fills for cut in way)

    least = min(map(time, ways))
    allowed = [way for way in ways if time(way) <= least * _PATIENCE[whole(way)]]
    return min(allowed, key=lambda way: (idles(way), sum(cut.bytes for cut in way), time(way)))


def _choose(geometry: Geometry, device: Device, backward: bool, regime: str) -> tuple[_Cut, ...] | None:
    """One cut per phase, all with blocks of equally many channels: partial sums are laid out by them."""
    ways = []
    for lanes in (32, 16, 8, 4, 2, 1):
        if lanes < 4 and splits_sectors(geometry, lanes * geometry.variant(regime, backward).vector):
            continue
        options = [list(_cuts(geometry, device, members, lanes, backward, regime)) for members in _phases(geometry)]
        if all(options):
            ways.append(tuple(_best([(cut,) for cut in cuts])[0] for cuts in options))
    return _best(ways) if ways else None


def _phase_fields(phase: _Phase, slab: int, geometry: Geometry) -> dict[str, int | tuple[int, ...]]:
    return {
        "slab": slab,
        "slabs": slabs_of(geometry, slab),
        "group_slots": group_slots(geometry, slab),
        "owned": phase.owned,
        "halo": phase.halo,
        "tiles": phase.tiles,
        "chunk": phase.chunk,
        "chunks": phase.chunks,
        "phase_direction": (phase.members * 2)[:2],
        "phase_directions": len(phase.members),
    }


def _turn(phase: _Phase, step: int, index: int, phases: int, backward: bool) -> dict[str, int]:
    """Whether a launch finds sums that earlier ones left, and whether it is the last to add to its chunk."""
    mirrored = phase.chunks - 1 - step
    second = len(phase.members) == 2 and (mirrored > step if backward else step > mirrored)
    final = index == phases - 1 and (len(phase.members) == 1 or second)
    return {"accumulate": int(index > 0 or second), "final": int(final)}


def _launches(
    geometry: Geometry,
    cut: _Cut,
    common: dict[str, int | tuple[int, ...]],
    index: int,
    phases: int,
    backward: bool,
    regime: str,
) -> Iterator[Launch]:
    """Yield the launches of one phase, the `index`-th of so many; sums of blocks are numbered in the order they run."""
    variant, phase = geometry.variant(regime, backward), cut.phase
    slab = cut.lanes * variant.vector
    blocks = phase.blocks(geometry, slab)
    grid, block = (blocks, len(phase.members), 1), (cut.lanes, cut.rows, 1)
    spans = phase.spans()

    def launch(kernel: str, span: tuple[int, int], chunk: int | None, more: dict[str, int]) -> Launch:
        shared = _long_shared_bytes(geometry, slab, cut.rows, chunk)
        return Launch(variant, kernel, grid, block, shared, {**common, **more, "step": span[0], "span": span[1]})

    if not backward:
        for span in spans:
            yield launch("gspn_scan_forward_kernel", span, None, _turn(phase, span[0], index, phases, False))
        return
    # Nothing reads the state after the last chunk.
    for span in spans[:-1] if phase.halo else [(0, phase.chunks - 1)]:
        yield launch("gspn_scan_states_kernel", span, None, {})
    for number, span in enumerate(reversed(spans)):
        turn = _turn(phase, span[0], index, phases, True)
        yield launch("gspn_scan_backward_kernel", span, phase.chunk, {**turn, "merge_offset": number * blocks})


def plan_long(geometry: Geometry, device: Device, backward: bool, regime: str = "long") -> Plan | None:
    """Cut the lines of each orientation, and order the launches so that none adds to sums another is adding to.

    None where clusters cannot hold a line, or the device has none.
    """
    cuts = None if regime == "wide" and not device.clusters else _choose(geometry, device, backward, regime)
    if cuts is None:
        return None
    slab = cuts[0].lanes * geometry.variant(regime, backward).vector
    merge_blocks = max(cut.phase.blocks(geometry, slab) * len(cut.phase.spans()) for cut in cuts)
    launches: list[Launch] = []
    buffers = {"states": 0}
    if geometry.dtype.itemsize < geometry.real_bytes:
        buffers["sums"] = geometry.tokens * geometry.channels
    for index, cut in enumerate(cuts):
        phase = cut.phase
        ring = phase.chunks if backward else 2
        common = {**_phase_fields(phase, slab, geometry), "ring": ring, "merge_blocks": merge_blocks}
        boundary = len(phase.members) * geometry.batch * phase.segments * phase.positions * geometry.channels
        buffers["states"] = max(buffers["states"], ring * boundary)
        if backward:
            buffers["carries"] = max(buffers.get("carries", 0), 2 * boundary)
        launches.extend(_launches(geometry, cut, common, index, len(cuts), backward, regime))
    ratio = sum(cut.bytes for cut in cuts) / geometry.floor_bytes(backward)
    if not backward:
        return Plan(regime, tuple(launches), buffers, ratio)
    finish, finish_buffers = finish_sums(geometry, slab, merge_blocks)
    return Plan(regime, (*launches, *finish), {**buffers, **finish_buffers}, ratio)
