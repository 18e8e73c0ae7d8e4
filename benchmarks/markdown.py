"""How results are written on pages: numbers, intervals, tables, and where figures come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def short(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, but never fewer than those before the point.

    >>> [short(value) for value in (0.04567, 1.0, 98.76, 12345.6)]
    ['0.0457', '1.00', '98.8', '12,346']
    """
    after = digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1
    return f"{value:,.{max(after, 0)}f}"


def plural(count: int, noun: str) -> str:
    """Write a count and its noun."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def mean_and_interval(found: dict[str, float]) -> str:
    """Write a mean and half of its 95% interval, which is symmetric; the mean alone where one seed has none."""
    half = found["high"] - found["mean"]
    return short(found["mean"]) if math.isnan(half) else f"{short(found['mean'])} ± {short(half, 2)}"


def ratio_and_interval(found: dict[str, float]) -> str:
    """Write a ratio and its 95% interval."""
    if math.isnan(found["low"]):
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def provenance(result: dict[str, Any]) -> str:
    """Say where the figures come from: processor, threads, software and commit."""
    machine, software = result.get("machine") or result["device"], result["software"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['kernels']}; torch {software['torch']}, "
        f"commit {software['commit']}."
    )
