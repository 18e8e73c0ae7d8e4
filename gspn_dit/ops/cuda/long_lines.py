"""Plans for long lines: directions two by two, sums over directions through memory.

The blocks of a cluster share a line where they can hold it ("wide"); else lines are cut into tiles of positions with
halos, and a launch walks one chunk of lines ("long").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gspn_dit.ops.cuda.devices import CLUSTER_BLOCKS, Device
from gspn_dit.ops.cuda.estimate import Score, best, score
from gspn_dit.ops.cuda.types import (
    Geometry,
    Launch,
    Plan,
    Variant,
    finish_sums,
    group_slots,
    lanes_of_blocks,
    slabs_of,
    straddling,
    thread_rows,
)

_FORWARD_CHUNKS = (4, 8, 16, 32, 64, 1 << 30)  # lines per launch
_BACKWARD_CHUNKS = (2, 4, 6, 8, 12, 16)
_COUNTER_BYTES = 16  # as in cuda/long_lines.cu, where blocks are in clusters


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

    def spans(self) -> list[tuple[int, int]]:
        """First chunk and number of chunks of each launch, in the order of a forward pass.

        Where blocks own whole lines they walk many chunks at once, up to where two directions would meet.
        """
        if self.halo:
            return [(step, 1) for step in range(self.chunks)]
        span = self.chunks // len(self.members)
        return [(step, span) for step in range(0, self.chunks, span)]

    def state_spans(self) -> list[tuple[int, int]]:
        """The same of a walk for states alone: nothing reads the one after the last chunk."""
        return self.spans()[:-1] if self.halo else [(0, self.chunks - 1)]

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
    """One way to run a phase: a launch of each of its kernels, how many there are, and the bytes that they move."""

    phase: _Phase
    runs: tuple[tuple[Launch, int, float], ...]

    @property
    def slab(self) -> int:
        """Channels of a block."""
        launch = self.runs[0][0]
        return launch.block[0] * launch.variant.vector

    def score(self, device: Device) -> Score:
        """Of all its launches."""
        scores = [score(launch, device, moved, times) for launch, times, moved in self.runs]
        return sum(scores[1:], scores[0])


def _moved_elements(geometry: Geometry, members: int, chunk: int) -> dict[str, float]:
    """Elements per token and channel that each kernel moves for so many of the directions, halos aside.

    Logits, gates, tokens and their gradients once for every time that a kernel needs them; sums over directions are
    stored by the first of them, read and stored by the others, and become the result with the last.
    """
    directions, wide = len(geometry.codes), geometry.real_bytes / geometry.dtype.itemsize
    logits = 3 * geometry.groups / geometry.channels
    sums = (2 * (directions - 1) * wide + 1) / directions
    end = wide / chunk  # a state that a chunk ends with
    elements = {
        "forward": 1 + logits + 2 + sums + end,
        "states": 1 + logits + 1 + end,
        "backward": 2 + 2 * (logits + 2) + sums + end,
    }
    return {name: members * count for name, count in elements.items()}


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
                yield _cut_into_runs(geometry, variant, phase, (lanes, rows, 1), backward)


def _cut_into_runs(
    geometry: Geometry, variant: Variant, phase: _Phase, block: tuple[int, int, int], backward: bool
) -> _Cut:
    slab = block[0] * variant.vector
    grid = (phase.blocks(geometry, slab), len(phase.members), 1)
    spans = phase.spans()
    read = (phase.positions + 2 * phase.halo * (phase.tiles - 1)) / phase.positions  # over the positions owned
    read *= straddling(geometry.channels, slab, geometry.dtype.itemsize)
    value = geometry.tokens * geometry.channels * geometry.dtype.itemsize * read
    elements = _moved_elements(geometry, len(phase.members), phase.chunk)

    def run(name: str, spans: list[tuple[int, int]]) -> tuple[Launch, int, float]:
        shared = _long_shared_bytes(geometry, slab, block[1], phase.chunk if name == "backward" else None)
        lines = min(phase.chunk * spans[0][1], geometry.segment(geometry.codes[phase.members[0]])[0])
        launch = Launch(variant, f"gspn_scan_{name}_kernel", grid, block, shared, {}, lines)
        return launch, len(spans), elements[name] * value

    if not backward:
        return _Cut(phase, (run("forward", spans),))
    return _Cut(phase, (run("states", phase.state_spans()), run("backward", spans)))


def _choose(geometry: Geometry, device: Device, backward: bool, regime: str) -> tuple[_Cut, ...] | None:
    """One cut per phase, all with blocks of equally many channels: partial sums are laid out by them."""

    def score_of(cuts: tuple[_Cut, ...]) -> Score:
        scores = [cut.score(device) for cut in cuts]
        return sum(scores[1:], scores[0])

    def ways(lanes_of: list[int]) -> Iterator[tuple[_Cut, ...]]:
        for lanes in lanes_of:
            options = [list(_cuts(geometry, device, members, lanes, backward, regime)) for members in _phases(geometry)]
            if all(options):
                yield tuple(best(cuts, lambda cut: cut.score(device)) for cuts in options)

    lanes_of = lanes_of_blocks(geometry, geometry.variant(regime, backward).vector)
    # Narrower blocks move sectors of others, too: only where none else holds the positions that a halo leaves.
    narrower = [lanes for lanes in (16, 8, 4, 2, 1) if lanes < min(lanes_of)]
    found = list(ways(lanes_of)) or list(ways(narrower))
    return best(found, score_of) if found else None


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
) -> Iterator[Launch]:
    """Yield the launches of one phase, the `index`-th of so many; sums of blocks are numbered in the order they run."""
    phase, spans = cut.phase, cut.phase.spans()

    def like(run: tuple[Launch, int, float], span: tuple[int, int], more: dict[str, int]) -> Launch:
        return replace(run[0], fields={**common, **more, "step": span[0], "span": span[1]})

    if not backward:
        for span in spans:
            yield like(cut.runs[0], span, _turn(phase, span[0], index, phases, False))
        return
    for span in phase.state_spans():
        yield like(cut.runs[0], span, {})
    for number, span in enumerate(reversed(spans)):
        turn = _turn(phase, span[0], index, phases, True)
        yield like(cut.runs[1], span, {**turn, "merge_offset": number * cut.runs[1][0].grid[0]})


def plan_long(geometry: Geometry, device: Device, backward: bool, regime: str = "long") -> Plan | None:
    """Cut the lines of each orientation, and order the launches so that none adds to sums another is adding to.

    None where clusters cannot hold a line, or the device has none.
    """
    cuts = None if regime == "wide" and not device.clusters else _choose(geometry, device, backward, regime)
    if cuts is None:
        return None
    slab = cuts[0].slab
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
        launches.extend(_launches(geometry, cut, common, index, len(cuts), backward))
    moved = sum(moved for cut in cuts for _, _, moved in cut.runs)
    ratio = moved / geometry.floor_bytes(backward)
    if not backward:
        return Plan(regime, tuple(launches), buffers, ratio)
    finish, finish_buffers = finish_sums(geometry, slab, merge_blocks)
    return Plan(regime, (*launches, *finish), {**buffers, **finish_buffers}, ratio)
