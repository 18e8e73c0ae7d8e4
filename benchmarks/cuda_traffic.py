"""Bytes that the CUDA kernels move over the fewest possible, counted without a GPU; the table of cuda/README.md.

Beside them, what the inspector estimates, and what the fused projected scan moves.

python -m benchmarks.cuda_traffic --out benchmarks/results/cuda_traffic.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks import scan_cases
from benchmarks.measure import CpuDevice, software
from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.cuda.host.harness import count_projected_backward_elements, count_projected_elements
from gspn_dit.ops.cuda.projected_plan import ProjectedGeometry
from gspn_dit.ops.inspect import inspect

DTYPE = torch.bfloat16
CASES: tuple[tuple[str, tuple[int, int, int, int]], ...] = (
    ("sm_90", (32, 16, 16, 1152)),
    ("sm_90", (32, 16, 16, 1500)),
    ("sm_90", (32, 16, 16, 900)),
    ("sm_90", (8, 32, 32, 1152)),
    ("sm_90", (8, 32, 32, 1500)),
    ("sm_90", (1, 128, 128, 256)),
    ("sm_90", (1, 1024, 1024, 64)),
    ("sm_80", (8, 32, 32, 1152)),
    ("sm_80", (1, 128, 128, 256)),
)
"""Architecture and [B, H, W, C]; every channel has weights of its own, G = C, in four directions."""

PROJECTED = ProjectedGeometry(DTYPE, 32, 16, 16, 1152, 1152, 72, (0, 1, 2, 3), 0, skip=True)
"""The mixer of the largest model at 256×256 pixels: 72 channels of a proxy."""

COUNTED_VALUES = 1 << 24
"""So many values of x are run to count: those of 1024×1024 tokens in one slab, which take minutes."""

PARTIAL_SUMS = {"float32": (4, 24), "24 bits": (3, 16), "bfloat16": (2, 8)}
"""What three of four directions could leave in memory of their sum: bytes, and significant bits."""


def measure_sums() -> list[dict[str, Any]]:
    """What it would cost in accuracy to keep sums over directions in fewer bits where they pass through memory.

    y is rounded to bfloat16 in the end. A value is off by more than its own rounding if its error is above 2⁻⁸ of it
    and 10⁻⁵ of the largest, the tolerance of the tests.
    """
    x, logits, *gates, merge = (t.double() for t in scan_cases.make_inputs((1, 96, 96, 16), 4, 16, DTYPE, "cpu"))
    parts = [
        gspn_scan(x, *(t[:, :, :, d : d + 1] for t in (logits, *gates)), merge[d : d + 1], directions=(name,))
        for d, name in enumerate(DIRECTIONS)
    ]
    exact = sum(parts, torch.zeros_like(x))
    allowed = 2**-8 * exact.abs() + 1e-5 * exact.abs().max()
    own_rounding = (exact.to(DTYPE) - exact).square().mean().sqrt()
    rows = []
    for name, (size, bits) in PARTIAL_SUMS.items():
        total = parts[0]
        for part in parts[1:]:
            total = rounded(total, bits) + part
        error = (total.to(DTYPE) - exact).abs()
        rows.append(
            {
                "sums": name,
                "forward_elements": 4 + 20 + 3 * size + 1,
                "share_beyond_tolerance": round(float((error > allowed).double().mean()), 4),
                "largest_error_over_tolerance": round(float((error / allowed).max()), 2),
                "error_over_own_rounding": round(float(error.square().mean().sqrt() / own_rounding), 3),
            }
        )
    return rows


def rounded(values: Tensor, bits: int) -> Tensor:
    """Round to so many significant bits, ties to even."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(fraction * 2.0**bits) / 2.0**bits, exponent)


def measure_projected() -> dict[str, Any]:
    """Count what the fused projected scan moves; through memory it is 42 elements per token and channel, then 103."""
    passes = {"forward": count_projected_elements(PROJECTED), "backward": count_projected_backward_elements(PROJECTED)}
    return {
        **{"arch": "sm_90", "shape": [PROJECTED.batch, PROJECTED.height, PROJECTED.width, PROJECTED.channels]},
        "proxy_channels": PROJECTED.proxy_channels,
        "elements": {name: round(sum(kernels.values()), 3) for name, kernels in passes.items()},
        "kernels": {name: round(count, 3) for kernels in passes.values() for name, count in kernels.items()},
    }


def measure(cases: tuple[tuple[str, tuple[int, int, int, int]], ...] = CASES) -> Iterator[dict[str, Any]]:
    """Yield both passes of every case: the main kernel's regime, the whole pass's ratio, and what each kernel takes."""
    for arch, shape in cases:
        reports = inspect(arch, (*shape, shape[-1]), [DTYPE], most_counted=COUNTED_VALUES)
        row: dict[str, Any] = {"arch": arch, "shape": list(shape)}
        for direction in ("forward", "backward"):
            # A pass begins with the kernel that is named after it.
            first = next(place for place, report in enumerate(reports) if f"_{direction}_" in report.kernel)
            main = reports[first]
            if main.reason is not None:
                raise UserError(f"the bytes of {arch} {shape} cannot be counted: {main.reason}")
            row[direction] = {"bytes_ratio": main.bytes_ratio, "regime": main.regime}
        row["kernels"] = [asdict(report) for report in reports]
        print(row | {"kernels": len(reports)}, flush=True)
        yield row


def main() -> None:
    """Count and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.cuda_traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    rows = list(measure())
    result = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "rows": rows,
        "sums": measure_sums(),
        "projected": measure_projected(),
        "machine": CpuDevice().describe(),
        "software": software(),
    }
    publish(result, options.out)


if __name__ == "__main__":
    run_cli(main)
