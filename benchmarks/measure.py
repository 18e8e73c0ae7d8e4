"""Clocks, memory counters and the description of the machine that every benchmark shares."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gspn_dit import environment
from gspn_dit.ops.cpu import binding as cpu

MEMORY_POLICY = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
"""Environment variables that change what memory and waiting cost."""

FEWEST_ROUNDS = 5


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return the best of repeated runs, their median, and how far it lies above the best, as a share."""
    best, median = min(seconds), statistics.median(seconds)
    return {
        "best_ms": round(1e3 * best, 4),
        "median_ms": round(1e3 * median, 4),
        "spread": round(median / best - 1, 4),
    }


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of repeated runs, and the processor seconds of all their threads."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, float]:
        """Milliseconds: the best, the median, and how far it lies above the best; the fewest of all processors."""
        return {**milliseconds(self.seconds), "cpu_ms": round(1e3 * min(self.cpu_seconds), 4)}


class CpuDevice:
    """How to time and weigh work on the CPU. Another device needs the same methods."""

    name = "cpu"
    needs_own_process = True
    """Memory is measured best in a fresh process: what earlier runs left behind hides what a run takes."""

    def __init__(self, seconds_in_turn: float = math.inf) -> None:
        """`time_together` starts no round after that time, once it has had `FEWEST_ROUNDS`."""
        self.seconds_in_turn = seconds_in_turn

    def time_together(self, runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
        """Time several functions in turn, so that a busy neighbour hits all of them alike; one warm-up each."""
        for run in runs.values():
            run()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        end = time.perf_counter() + self.seconds_in_turn
        for done in range(repeats):
            if done >= FEWEST_ROUNDS and time.perf_counter() > end:
                break
            for name, run in runs.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                run()
                seconds[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
        return {name: Timing(*zip(*values)) for name, values in seconds.items()}

    def peak_extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Return how far resident memory rises during a run, or None where /proc does not say."""
        cpu.output_memory.release()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or what earlier runs freed would hide what this one takes
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
            before = status_bytes("VmRSS")
            result = run()
            peak = status_bytes("VmHWM")
            del result
        except OSError:
            return None
        return peak - before

    def describe(self) -> dict[str, object]:
        facts = environment.machine()
        return {
            "processor": facts["processor"],
            "instruction_sets": facts["instruction_sets"],
            "cores": facts["cores"],
            "threads": torch.get_num_threads(),
            "load_average": [round(value, 2) for value in os.getloadavg()],
            "kernels": cpu.describe(),
            "memory_policy": {name: os.environ.get(name) for name in MEMORY_POLICY},
        }


def status_bytes(field: str) -> int:
    """Return a size that /proc says of this process, as "VmRSS" or "VmHWM"; OSError where it does not."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def software() -> dict[str, str | None]:
    """Versions, and the commit if this is a checkout."""
    # Results and pages change with every run and say nothing of the code that ran.
    changed = environment.git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md", ":!*.png"
    )
    return {
        "python": environment.versions([])["python"],
        "torch": torch.__version__,  # names its build too, which the metadata of the installed package does not
        "system": environment.machine()["platform"],
        "commit": (environment.git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else ""),
    }
