"""Facts of the environment: versions, commit, machine. `python gspn_dit/environment.py` prints the machine's.

Nothing but the standard library is imported, so that a broken or missing installation can be described as well.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RUN_PACKAGES = (
    *("torch", "numpy", "accelerate", "diffusers", "datasets", "safetensors", "deepspeed"),
    *("cupy-cuda12x", "cupy-cuda13x"),
)
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "neon", "asimd", "asimdhp", "sve", "sve2"),
)
"""Those that decide how numbers are computed, by the names that Linux gives them."""


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the versions of Python, this project and packages; None for what is not installed."""
    from gspn_dit import __version__

    found = {package: installed_version(package) for package in packages}
    return {"python": platform.python_version(), "gspn-dit": __version__, **found}


def git(*arguments: str) -> str | None:
    """Return what git says about the source tree, or None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo(*fields: str) -> str | None:
    """Return the first processor's value of the first of the fields that /proc/cpuinfo has, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    return next((values[field] for field in fields if field in values), None)


def machine() -> dict[str, Any]:
    """Return the platform, processor, its instruction sets, the cores this process may use, and memory in bytes.

    Memory is None, and the list of instruction sets empty, where the system does not say.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    flags = (_cpuinfo("flags", "Features") or "").split()
    return {
        "platform": platform.platform(),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
    }


def describe_run() -> dict[str, Any]:
    """Return versions, the git commit of the source, the machine and the command, as JSON types."""
    return {
        "versions": {name: version for name, version in versions(RUN_PACKAGES).items() if version is not None},
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
    }


def gibibytes(size_bytes: int | None) -> str:
    """Return a size for a reader."""
    return "unknown" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"


def machine_lines(facts: dict[str, Any]) -> list[str]:
    """Lay the facts of `machine` out for a reader, a line each."""
    rows = {
        "platform": facts["platform"],
        "processor": facts["processor"],
        "instructions": " ".join(facts["instruction_sets"]) or "unknown",
        "cores": facts["cores"],
        "memory": gibibytes(facts["memory_bytes"]),
    }
    return [f"{name:<15}{value}" for name, value in rows.items()]


if __name__ == "__main__":
    print("\n".join(machine_lines(machine())))
