"""How a projected scan is cut into launches of the fused kernels (`cuda/projected_*.cu`), or why it is not.

Arithmetic on shapes alone, as in `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.types import Launch, Variant, straddling

POINTERS = (
    *("x", "proxy", "logits_weight", "input_gate_weight", "output_gate_weight", "skip_weight", "merge_weight", "y"),
    *("grad_y", "grad_x", "grad_proxy", "grad_logits_weight", "grad_input_gate_weight", "grad_output_gate_weight"),
    *("grad_skip_weight", "grad_merge_weight", "proxy_sums", "weight_sums", "skip_sums", "merge_sums"),
)
FIELDS: tuple[tuple[str, int], ...] = (
    *((name, 1) for name in POINTERS),
    *((name, 1) for name in ("batch", "height", "width", "channels", "groups", "proxy_channels", "directions")),
    *(("code", 4), ("window", 1), ("merge_is_float", 1)),
    *(("x_stride", 3), ("proxy_stride", 3), ("grad_y_stride", 3)),
    *((name, 1) for name in ("slab", "slabs", "parts", "stages", "spans", "slots", "steps", "group_bits", "job")),
    *((f"{name}_{step}", 1) for name in ("proxy", "x", "sum", "grad") for step in ("pitch", "row")),
)
"""Names and lengths of the eight-byte fields of `gspn::ProjectedProblem` in cuda/projected.cuh, in order."""

WARP_CHANNELS = 8
MOST_BACKWARD_WARPS = 8
_MOST_PROXY = 160  # channels of a proxy whose weights fit in the registers of a warp
_MOST_TILES = 4  # of 16 positions, which a warp holds
_BANK_WORDS = 32


@dataclass(frozen=True)
class ProjectedVariant(Variant):
    """One compiled module of fused kernels; its vectors are elements of a row.

    Its regime is "projected_forward", "projected_backward" or "projected_join", the sums after the latter.
    """

    proxy: int
    """Channels of the proxy, padded."""
    tiles: int
    """Sixteens of positions that a warp holds."""
    cluster: int = 1
    """Blocks of a cluster."""

    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster."""
        return self.cluster

    @property
    def source(self) -> str:
        """Name of the source file."""
        return f"{self.regime}.cu"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in it."""
        return (f"gspn_{self.regime}_kernel",)

    @property
    def forward_threads(self) -> int:
        """Most threads of a block of the forward kernel: what the weights in its registers leave room for."""
        return 512 if self.proxy <= 80 and self.tiles == 1 else 256

    @property
    def backward_threads(self) -> int:
        """Most threads of a block of the backward kernel: each may take all registers that there are."""
        return 32 * MOST_BACKWARD_WARPS

    @property
    def defines(self) -> dict[str, int]:
        """Macros of `cuda/common.cuh` and `cuda/projected.cuh`."""
        own = {"GSPN_PROXY": self.proxy, "GSPN_TILES": self.tiles}
        return {**super().defines, **own}


@dataclass(frozen=True)
class ProjectedGeometry:
    """Shapes of one call; `vector` is 4 where all rows of all tensors are aligned words of 4 elements, else 1."""

    dtype: torch.dtype
    batch: int
    height: int
    width: int
    channels: int
    groups: int
    proxy_channels: int
    codes: tuple[int, ...]
    window: int
    vector: int = 4
    skip: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.height * self.width

    @property
    def padded_proxy(self) -> int:
        """Channels of the proxy up to a multiple of 8."""
        return -(-self.proxy_channels // 8) * 8

    @property
    def tiles(self) -> int:
        """Sixteens of positions of the longest line, up to a power of two."""
        longest = max(self.height if code < 2 else self.width for code in self.codes)
        return 1 << max(0, -(-longest // 16) - 1).bit_length()

    def variant(self, regime: str = "projected_forward", cluster: int = 1) -> ProjectedVariant:
        """A module for this call."""
        backward = regime != "projected_forward"
        sizes = (self.padded_proxy, self.tiles, cluster)
        return ProjectedVariant(regime, self.dtype, self.vector, False, *sizes, backward=backward)

    def floor_bytes(self, backward: bool = False) -> int:
        """Fewest bytes a pass can move, the weights aside: every token read once and written once."""
        elements = 3 * self.channels + 2 * self.proxy_channels if backward else 2 * self.channels + self.proxy_channels
        return self.tokens * elements * self.dtype.itemsize


@dataclass(frozen=True)
class ProjectedPlan:
    """The launches of one pass, and the lengths of its buffers of float32: none forwards."""

    launches: tuple[Launch, ...]
    buffers: dict[str, int] = field(default_factory=dict)


def refusal(
    geometry: ProjectedGeometry, device: Device, most_proxy: int = _MOST_PROXY, most_tiles: int = _MOST_TILES
) -> str | None:
    """Say why no fused kernel takes a call, whatever its shared memory, or None."""
    if not device.tensor_cores:
        return "the fused kernels need a GPU of compute capability 8.0 or later"
    if geometry.dtype == torch.float64:
        return "there are no fused kernels for float64"
    if geometry.padded_proxy > most_proxy:
        return f"a proxy of {geometry.proxy_channels} channels is wider than the {most_proxy} that registers hold"
    if geometry.tiles > most_tiles:
        return f"lines of {geometry.height}×{geometry.width} are longer than the {16 * most_tiles} of a warp"
    return None


def _pitch(size: int, step: int, apart: int, run: int, slack: int) -> int:
    """Words of 4 bytes from one row of shared memory to the next: at least `size`, a multiple of `step`.

    Of these, with at most `slack` words more, the one with the fewest bank conflicts: groups of four lanes read runs of
    `run` words each, all that are served together `apart` rows from one another.
    """

    def conflicts(pitch: int) -> int:
        groups = range(_BANK_WORDS // run)
        banks = [(group * apart * pitch + i) % _BANK_WORDS for group in groups for i in range(run)]
        return max(banks.count(bank) for bank in banks)

    first = -(-size // step) * step
    return min(range(first, first + slack + 1, step), key=lambda pitch: (conflicts(pitch), pitch))


def pitches(
    geometry: ProjectedGeometry, name: str, elements: int, itemsize: int, *, run: int, step: int, slack: int = 31
) -> dict[str, int]:
    """Elements from token to token and from row to row of a plane whose tokens have `elements` of `itemsize` bytes.

    Four lanes read `run` words of a token at a time, and `step` words at least travel as one; a token may take `slack`
    words more than it has.
    """
    size = -(-elements * itemsize // 4)
    pitch = _pitch(size, step, 2 * geometry.tiles, run, slack)
    row = _pitch(geometry.width * pitch, step, 2 * geometry.tiles, run, 31)
    return {f"{name}_pitch": pitch * 4 // itemsize, f"{name}_row": row * 4 // itemsize}


@dataclass(frozen=True)
class _Block:
    """A shape of block that fits, and what it costs in relative time."""

    cost: float
    slab: int
    parts: int
    shared_bytes: int
    fields: dict[str, int]


def _forward_blocks(geometry: ProjectedGeometry, device: Device) -> Iterator[_Block]:
    itemsize, directions = geometry.dtype.itemsize, len(geometry.codes)
    most = min(device.threads, geometry.variant().forward_threads)
    planes = len({code < 2 for code in geometry.codes})
    for warps in (8, 4, 2, 1):
        slab = warps * WARP_CHANNELS
        if 32 * warps * directions > most or (warps > 1 and slab // 2 >= geometry.channels):
            continue
        quad = itemsize  # words of four elements
        steps = {
            **pitches(geometry, "proxy", geometry.padded_proxy, itemsize, run=8, step=quad),
            **pitches(geometry, "x", slab, itemsize, run=4, step=quad),
            **pitches(geometry, "sum", slab, 4, run=8, step=2),
        }
        stage = geometry.height * (steps["proxy_row"] + steps["x_row"]) * itemsize
        fixed = geometry.height * steps["sum_row"] * 4 * planes
        fixed += slab * geometry.padded_proxy * itemsize if geometry.skip and itemsize == 2 else 0
        all_weights = 5 * directions * slab * geometry.padded_proxy * itemsize if itemsize == 2 else 0
        slabs = -(-geometry.channels // slab)
        for stages in (2, 1):
            shared = max(fixed + stages * stage, all_weights)
            if shared + 1024 > device.shared_bytes:
                continue
            moved = 2 * straddling(geometry.channels, slab, itemsize) + geometry.proxy_channels / slab
            weights = directions * 5 * geometry.proxy_channels / (geometry.height * geometry.width)
            turns, parts = _parts(geometry.batch, slabs, device.processors, weights / moved)
            cost = turns * moved * slab * (1.0 if stages == 2 or parts == geometry.batch else 1.2)
            yield _Block(cost, slab, parts, shared, {**steps, "stages": stages})
            break


def _parts(batch: int, slabs: int, processors: int, weights: float) -> tuple[float, int]:
    """Return the least time, in images, and into how many blocks per slab the batch is cut for it.

    A block takes one multiprocessor, and its weights as long as so many images.
    """
    return min(
        (-(-slabs * parts // processors) * (-(-batch // parts) + weights), parts) for parts in range(1, batch + 1)
    )


@lru_cache(maxsize=512)
def plan_forward(geometry: ProjectedGeometry, device: Device) -> ProjectedPlan | str:
    """Return the launches of the forward pass, or in one line why the fused kernels do not take it."""
    if (reason := refusal(geometry, device)) is not None:
        return reason
    blocks = list(_forward_blocks(geometry, device))
    if not blocks:
        return f"images of {geometry.height}×{geometry.width} do not fit in the shared memory of a block"
    best = min(blocks, key=lambda block: block.cost)
    variant = geometry.variant()
    slabs = -(-geometry.channels // best.slab)
    fields: dict[str, int | tuple[int, ...]] = {"slab": best.slab, "slabs": slabs, "parts": best.parts, **best.fields}
    warps = best.slab // WARP_CHANNELS * len(geometry.codes)
    grid, block = (slabs, best.parts, 1), (32, warps, 1)
    launch = Launch(variant, variant.kernels[0], grid, block, best.shared_bytes, fields)
    return ProjectedPlan((launch,))
