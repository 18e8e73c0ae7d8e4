"""What a plan of launches of the CUDA kernels is made of: compiled variants, devices, shapes of calls, launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gspn_dit.ops.contract import compute_dtype
from gspn_dit.ops.cuda.devices import CLUSTER_BLOCKS

SECTOR_BYTES = 32
STORAGE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

POINTERS = (
    *("x", "weight_logits", "input_gate", "output_gate", "grad_y", "merge_weight"),
    *("y", "grad_x", "grad_weight_logits", "grad_input_gate", "grad_output_gate", "grad_merge_weight"),
    *("sums", "states", "carries", "merge_sums", "group_sums"),
)
FIELDS: tuple[tuple[str, int], ...] = (
    *((name, 1) for name in POINTERS),
    *((name, 1) for name in ("batch", "height", "width", "channels", "groups", "directions")),
    *(("code", 4), ("window", 1), ("merge_is_float", 1)),
    *(("x_stride", 3), ("grad_y_stride", 3), ("weight_logits_stride", 5)),
    *(("input_gate_stride", 4), ("output_gate_stride", 4)),
    *((name, 1) for name in ("slab", "slabs", "group_slots", "owned", "halo", "tiles")),
    *((name, 1) for name in ("chunk", "chunks", "ring", "step", "span")),
    *(("phase_direction", 2), ("phase_directions", 1), ("accumulate", 1), ("final", 1)),
    *(("merge_offset", 1), ("merge_blocks", 1)),
)
"""Names and lengths of the eight-byte fields of `gspn::Problem` in cuda/common.cuh, in order."""


@dataclass(frozen=True)
class Variant:
    """One compiled module of kernels."""

    regime: str
    """"short", "cluster", "wide", "long" or "finish"; "wide" is "long" with lines that clusters share."""
    dtype: torch.dtype
    vector: int
    """Channels per thread."""
    shared_weights: bool
    backward: bool = field(default=False, kw_only=True)
    """Whether it holds the kernels of the backward pass; the module "finish" serves that alone."""

    @property
    def source(self) -> str:
        """Name of the source file."""
        sources = {"finish": "finish.cu", "wide": "long_lines.cu"}
        return sources.get(self.regime, f"{self.regime}_lines.cu")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in it."""
        if self.regime == "finish":
            return ("gspn_scan_merge_kernel", "gspn_scan_groups_kernel")
        if not self.backward:
            return ("gspn_scan_forward_kernel",)
        states = ("gspn_scan_states_kernel",) if self.regime in ("wide", "long") else ()
        return (*states, "gspn_scan_backward_kernel")

    @property
    def lines(self) -> int:
        """Lines whose logits a thread of a backward kernel keeps in registers (`GSPN_LINES`)."""
        return 8 if self.regime == "cluster" else 16

    @property
    def forward_threads(self) -> int:
        """Most threads of a block of the forward kernels."""
        return 256 if self.regime == "cluster" else 512

    @property
    def backward_threads(self) -> int:
        """Most threads of a block of the backward kernel: what its registers leave room for."""
        narrow = self.regime == "short" and self.dtype.itemsize == 2 and self.vector == 1
        return 256 if narrow or self.regime == "cluster" or self.dtype == torch.float64 else 512

    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster."""
        return CLUSTER_BLOCKS if self.regime in ("cluster", "wide") else 1

    @property
    def defines(self) -> dict[str, int]:
        """Macros that the sources ask for."""
        return {
            "GSPN_STORAGE": STORAGE_CODES[self.dtype],
            "GSPN_VECTOR": self.vector,
            "GSPN_SHARED_WEIGHTS": int(self.shared_weights),
            "GSPN_BACKWARD": int(self.backward),
            "GSPN_LINES": self.lines,
            "GSPN_CLUSTER": self.cluster_blocks,
            "GSPN_FORWARD_THREADS": self.forward_threads,
            "GSPN_BACKWARD_THREADS": self.backward_threads,
        }


def widest_vector(regime: str, dtype: torch.dtype, backward: bool = False) -> int:
    """Channels per thread where alignment allows: a word of 8 bytes, of 4 where more registers would spill."""
    words = 1 if regime == "finish" else 4 if backward and regime in ("short", "cluster") else 8
    return max(1, words // dtype.itemsize)


@dataclass(frozen=True)
class Geometry:
    """Shapes of one call; `alignment` is the largest power of two, in elements, that all strides are multiples of."""

    dtype: torch.dtype
    batch: int
    height: int
    width: int
    channels: int
    groups: int
    codes: tuple[int, ...]
    window: int
    alignment: int = 8

    @property
    def real_bytes(self) -> int:
        """Bytes of a value as it is computed."""
        return compute_dtype(self.dtype).itemsize

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.height * self.width

    def variant(self, regime: str, backward: bool) -> Variant:
        """The module for a pass: vectors as wide as alignment and groups allow, else single channels."""
        vector = widest_vector(regime, self.dtype, backward)
        shared = self.groups != self.channels
        per_group = self.channels // self.groups if shared else vector
        while self.channels % vector or self.alignment % vector or per_group % vector:
            vector //= 2
        return Variant(regime, self.dtype, vector, shared, backward=backward)

    def segment(self, code: int) -> tuple[int, int]:
        """Lines of the longest segment of a direction, and segments."""
        lines = self.lines_of(code)[0]
        steps = min(self.window, lines) if self.window else lines
        return steps, -(-lines // steps)

    def floor_bytes(self, backward: bool) -> int:
        """Fewest bytes a pass can move: every input read and every output written once."""
        gates = len(self.codes) * (3 * self.groups + 2 * self.channels)
        elements = (3 * self.channels + 2 * gates) if backward else (2 * self.channels + gates)
        return self.tokens * elements * self.dtype.itemsize

    def unread_logits(self) -> float:
        """Logits per token that no pass reads: those of first lines, and of neighbours off a line."""
        unread = 0.0
        for code in self.codes:
            lines, positions = self.lines_of(code)
            first = self.segment(code)[1] / lines
            unread += 3 * first + (1 - first) * 2 / positions
        return unread * self.groups

    def bytes_over_floor(self, extra: float, backward: bool) -> float:
        """Bytes that a pass moves over `floor_bytes` if it moves so many elements per token twice."""
        more = (extra - self.unread_logits()) * self.tokens * self.dtype.itemsize
        return 1 + more / self.floor_bytes(backward)

    def lines_of(self, code: int) -> tuple[int, int]:
        """Lines, and positions on each, of a direction."""
        return (self.width, self.height) if code < 2 else (self.height, self.width)


@dataclass(frozen=True)
class Launch:
    """One launch: `fields` are the entries of `gspn::Problem` that the plan decides."""

    variant: Variant
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    fields: dict[str, int | tuple[int, ...]]
    lines: int = 0
    """That a block walks one after the other, the way back not counted; 0 where there is no such walk."""

    @property
    def blocks(self) -> int:
        """Of the whole grid."""
        return math.prod(self.grid)

    @property
    def threads(self) -> int:
        """Of a block."""
        return math.prod(self.block)


@dataclass(frozen=True)
class Plan:
    """The launches of one pass, and the lengths of the buffers in accumulation precision that they use."""

    regime: str
    launches: tuple[Launch, ...]
    buffers: dict[str, int]
    bytes_ratio: float
    """Estimate of the bytes moved over the fewest possible, by which regimes are compared."""


def straddling(channels: int, slab: int, itemsize: int) -> float:
    """Sectors moved over sectors filled when rows of `channels` are read in runs of `slab`, averaged over rows."""
    touched = 0
    period = SECTOR_BYTES // math.gcd(SECTOR_BYTES, channels * itemsize)
    for row in range(period):
        for first in range(0, channels, slab):
            begin = (row * channels + first) * itemsize
            end = begin + min(slab, channels - first) * itemsize
            touched += (end - 1) // SECTOR_BYTES - begin // SECTOR_BYTES + 1
    return touched * SECTOR_BYTES / (period * channels * itemsize)


def lanes_of_blocks(geometry: Geometry, vector: int) -> list[int]:
    """Lanes that channels may take in a block: none stays idle, and no two blocks move the same sector of a row."""
    slabs = {lanes: lanes * vector for lanes in (32, 16, 8, 4, 2, 1)}
    return [
        lanes
        for lanes, slab in slabs.items()
        if (lanes == 1 or slab // 2 < geometry.channels)
        and (slab * geometry.dtype.itemsize >= SECTOR_BYTES or slab >= geometry.channels)
    ]


def slabs_of(geometry: Geometry, slab: int) -> int:
    """Blocks that the channels take."""
    return -(-geometry.channels // slab)


def thread_rows(lanes: int, positions: int) -> int:
    """Thread rows for a line, rounded up to whole warps."""
    step = max(1, 32 // lanes)
    return -(-positions // step) * step


def group_slots(geometry: Geometry, slab: int) -> int:
    """Groups that the channels of one slab can belong to; 0 where each group's sum stays inside its slab."""
    per_group = geometry.channels // geometry.groups
    if geometry.groups == geometry.channels or slab % per_group == 0:
        return 0
    return min(geometry.groups, (slab + per_group - 2) // per_group + 1)


def finish_sums(geometry: Geometry, slab: int, merge_blocks: int) -> tuple[list[Launch], dict[str, int]]:
    """The sums over blocks after a backward pass, and the buffers they read."""
    variant = Variant("finish", geometry.dtype, 1, geometry.groups != geometry.channels, backward=True)
    slots = group_slots(geometry, slab)
    fields: dict[str, int | tuple[int, ...]] = {
        "slab": slab,
        "slabs": slabs_of(geometry, slab),
        "group_slots": slots,
        "merge_blocks": merge_blocks,
    }
    directions = len(geometry.codes)
    launches = [Launch(variant, "gspn_scan_merge_kernel", (directions, 1, 1), (256, 1, 1), 0, fields)]
    buffers = {"merge_sums": directions * merge_blocks}
    if slots:
        entries = geometry.tokens * directions * 3
        blocks = -(-entries * geometry.groups // 256)
        launches.append(Launch(variant, "gspn_scan_groups_kernel", (blocks, 1, 1), (256, 1, 1), 0, fields))
        buffers["group_sums"] = slabs_of(geometry, slab) * entries * slots
    return launches, buffers


Launcher = Callable[[Launch, bytes, Mapping[str, Tensor]], None]
"""Runs one launch, given the bytes of its `gspn::Problem` and the tensors that its pointers point into."""
