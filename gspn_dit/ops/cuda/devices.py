"""GPUs as plans and estimates see them: what a block may take, what a multiprocessor holds, how fast both are."""

from __future__ import annotations

from dataclasses import dataclass, replace

CLUSTER_BLOCKS = 8
"""Blocks of a cluster: the most that every device with clusters can run."""
_GROUP_PROCESSORS = 18  # multiprocessors of a group (GPC), at most; a cluster never crosses into another
_RESERVED_SHARED_BYTES = 1024  # of each block, for the system


def has_clusters(major: int) -> bool:
    """Whether devices of a compute capability run clusters of eight blocks with large shared memory: 9.0 and 10.0.

    Consumer devices of 12.0 have 99 KB per block, and their clusters are not known to hold eight of them.
    """
    return major in (9, 10)


def fewest_clusters(processors: int) -> int:
    """Clusters of eight blocks, one block on a multiprocessor, that so many multiprocessors run at once at least.

    What is assumed where the driver cannot be asked: of a device's groups of at most 18 multiprocessors, as many as are
    certainly there hold two each. An H100, 132 multiprocessors, has 14 by this.
    """
    return _GROUP_PROCESSORS // CLUSTER_BLOCKS * (processors // _GROUP_PROCESSORS)


@dataclass(frozen=True)
class Device:
    """What a launch must fit, and how fast it can be; an H100 SXM unless told otherwise."""

    shared_bytes: int = 227 * 1024
    """Of a block."""
    processors: int = 132
    """Multiprocessors."""
    threads: int = 1024
    """Of a block."""
    clusters: int = fewest_clusters(132)
    """Clusters of eight blocks at once, where a block fills a multiprocessor; 0: blocks do not reach each other."""
    tensor_cores: bool = True
    """Those of compute capability 8.0, with bfloat16 and asynchronous copies."""
    held_shared_bytes: int = 228 * 1024
    """Of a multiprocessor."""
    held_threads: int = 2048
    """Of a multiprocessor."""
    held_blocks: int = 32
    """Of a multiprocessor."""
    registers: int = 65536
    """Of a multiprocessor."""
    bandwidth_gbs: float = 3350.0
    """Of the memory."""
    clock_ghz: float = 1.755
    """Of the multiprocessors, under load."""

    def share(self, part: int, whole: int) -> Device:
        """A device that is smaller in proportion, for a part of the work."""

        def scaled(count: int) -> int:
            return max(1, round(count * part / whole))

        return replace(
            self,
            processors=scaled(self.processors),
            clusters=scaled(self.clusters) if self.clusters else 0,
            bandwidth_gbs=self.bandwidth_gbs * part / whole,
        )

    def resident(self, registers: int, threads: int, shared_bytes: int) -> int:
        """Blocks of a kernel that a multiprocessor holds at once; `registers` are those of a thread."""
        warps = -(-threads // 32)
        warp_registers = -(-registers * 32 // 256) * 256
        per_quarter = self.registers // 4 // warp_registers  # warps live in four quarters, registers with them
        block_shared = -(-(shared_bytes + _RESERVED_SHARED_BYTES) // 128) * 128
        return min(
            self.held_blocks,
            self.held_threads // (32 * warps),
            4 * per_quarter // warps,
            self.held_shared_bytes // block_shared,
        )

    def at_once(self, resident: int, cluster: int) -> int:
        """Blocks that run at once, where a multiprocessor holds so many, in clusters of `cluster` blocks.

        Clusters of two leave no multiprocessor of a group idle, those of four as many as those of eight.
        """
        single = self.processors if cluster <= 2 else self.clusters * CLUSTER_BLOCKS
        return max(1, resident) * max(single, cluster)


def _device(processors: int, threads: int, blocks: int, shared: int, block_shared: int, **others: float) -> Device:
    limits = {"held_threads": threads, "held_blocks": blocks, "held_shared_bytes": shared * 1024}
    return Device(block_shared * 1024, processors, **limits, **others)  # type: ignore[arg-type]


ARCHITECTURES = {
    "sm_75": _device(40, 1024, 16, 64, 64, clusters=0, tensor_cores=False, bandwidth_gbs=320.0, clock_ghz=1.59),
    "sm_80": _device(108, 2048, 32, 164, 163, clusters=0, bandwidth_gbs=2039.0, clock_ghz=1.41),
    "sm_86": _device(84, 1536, 16, 100, 99, clusters=0, bandwidth_gbs=1008.0, clock_ghz=1.86),
    "sm_89": _device(128, 1536, 24, 100, 99, clusters=0, bandwidth_gbs=1008.0, clock_ghz=2.52),
    "sm_90": Device(),
    "sm_100": _device(148, 2048, 32, 228, 227, clusters=fewest_clusters(148), bandwidth_gbs=8000.0, clock_ghz=1.965),
    "sm_120": _device(170, 1536, 24, 100, 99, clusters=0, bandwidth_gbs=1792.0, clock_ghz=2.407),
}
"""The largest common device of each architecture; T4, A100, RTX 3090 Ti, RTX 4090, H100, B200 and RTX 5090."""
