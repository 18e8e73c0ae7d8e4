"""`python -m gspn_dit.ops.inspect --arch sm_90 --shape B,H,W,C,G --json`: what the CUDA kernels cost, without a GPU.

Prints one object per kernel that a scan of that shape launches in four directions, for every dtype: registers, memory
and spills as the assembler reports them, occupancy, bytes moved over the fewest possible, instructions by kind, and
the least time that bytes, issue, special functions and latency leave. Bytes are counted, not computed: g++ builds the
kernels for the host, and every access of a warp is cut into 32-byte sectors. Instructions are read from the machine
code where nvdisasm is there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

import torch

from gspn_dit.ops.contract import STORAGE_DTYPES
from gspn_dit.ops.cuda import sass
from gspn_dit.ops.cuda.devices import ARCHITECTURES, Device
from gspn_dit.ops.cuda.estimate import LineCost, estimate_all
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.plan import plan
from gspn_dit.ops.cuda.projected_backward_plan import plan_backward
from gspn_dit.ops.cuda.projected_plan import ProjectedGeometry, ProjectedPlan, plan_forward
from gspn_dit.ops.cuda.sources import compile_cubin
from gspn_dit.ops.cuda.types import SECTOR_BYTES, Geometry, Launch, Plan, Variant

FUSED_DTYPES = (torch.bfloat16, torch.float16)
COUNTED_VALUES = 1 << 22
"""So many values of x are run to count, at most: half a minute."""


@dataclass(frozen=True)
class Resources:
    """What the assembler says of a kernel."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class KernelReport:
    """One kernel of one dtype; `bytes_ratio` is the whole pass's, `kernel_bytes_ratio` this kernel's part of it."""

    kernel: str
    dtype: str
    regime: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    occupancy: float
    bytes_ratio: float | None
    predicted_ms: float | None
    """The largest of the four below, all launches together: a floor."""
    bound: str | None
    """Which of them that is."""
    bytes_ms: float | None
    issue_ms: float | None
    special_ms: float | None
    latency_ms: float | None
    code_bytes: int | None
    instructions: dict[str, float] | None
    """Per channel of a thread: a warp's for one line, there and back, by kind; None without nvdisasm."""
    kernel_bytes_ratio: float | None
    launches: int
    blocks: int
    """Of the largest launch."""
    waves: float
    """Blocks over those that run at once, clusters as the device holds them; fewer than one leave room."""
    reason: str | None
    """Why there is no ratio."""


def parse_log(log: str) -> dict[str, Resources]:
    """Read registers, static shared memory, stack and spills of each kernel from ptxas's verbose output."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            name: sum(map(int, re.findall(pattern, part)))
            for name, pattern in {
                "registers": r"Used (\d+) registers",
                "shared_bytes": r"(\d+) bytes smem",
                "stack_bytes": r"(\d+) bytes stack frame",
                "stores": r"(\d+) bytes spill stores",
                "loads": r"(\d+) bytes spill loads",
            }.items()
        }
        spills = numbers.pop("stores") + numbers.pop("loads")
        found[part.split("'")[0]] = Resources(**numbers, spill_bytes=spills)
    return found


def count_bytes(
    geometry: Geometry, device: Device, backward: bool, most: int = COUNTED_VALUES
) -> tuple[dict[str, float], str | None]:
    """Bytes of each kernel of a pass over the fewest possible, or the reason why they cannot be counted."""
    part, smaller = harness.whole_sectors(geometry, device, backward)
    if part.tokens * part.channels > most:
        return {}, f"more than {most} values take too long on the host"
    if harness.compiler() is None:
        return {}, "g++ is not installed: apt-get install g++"
    try:
        sectors = harness.count_sectors(part, backward, smaller)
    except RuntimeError as error:
        return {}, str(error)
    floor = part.floor_bytes(backward)
    return {kernel: SECTOR_BYTES * number / floor for kernel, number in sectors.items()}, None


def count_projected_bytes(
    geometry: ProjectedGeometry, device: Device, backward: bool
) -> tuple[dict[str, float], str | None]:
    """The same of a fused pass of the projected scan."""
    if harness.compiler() is None:
        return {}, "g++ is not installed: apt-get install g++"
    count = harness.count_projected_backward_elements if backward else harness.count_projected_elements
    whole = geometry.tokens * geometry.channels * geometry.dtype.itemsize / geometry.floor_bytes(backward)
    return {kernel: elements * whole for kernel, elements in count(geometry, device).items()}, None


@dataclass(frozen=True)
class _Compiled:
    """One module's kernels, by name."""

    resources: dict[str, Resources]
    code: dict[str, sass.Code]
    """Empty without nvdisasm."""


class _Modules(dict[Variant, _Compiled]):
    """Modules of an architecture, compiled when they are first asked for."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch

    def __missing__(self, variant: Variant) -> _Compiled:
        cubin, log = compile_cubin(variant, self.arch)
        code = sass.read_code(cubin, variant) if sass.disassembler() is not None else {}
        self[variant] = _Compiled(parse_log(log), code)
        return self[variant]


def line_cost(code: sass.Code, registers: int) -> LineCost:
    """What the machine code of a kernel takes for a line."""
    return LineCost(sum(code.instructions.values()), code.instructions.get("special", 0.0), code.steps, registers)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


Call = tuple[Geometry, Plan] | tuple[ProjectedGeometry, ProjectedPlan]


def _report(call: Call, arch: str, device: Device, backward: bool, modules: _Modules, most: int) -> list[KernelReport]:
    """One report for each kernel of a pass."""
    geometry, todo = call
    if isinstance(geometry, ProjectedGeometry):
        ratios, reason = count_projected_bytes(geometry, device, backward)
    else:
        ratios, reason = count_bytes(geometry, device, backward, most)
    total = sum(ratios.values()) if reason is None else None
    launches: dict[tuple[Variant, str], list[Launch]] = {}
    for launch in todo.launches:
        launches.setdefault((launch.variant, launch.kernel), []).append(launch)
    reports = []
    for (variant, kernel), runs in launches.items():
        costs, code = modules[variant].resources[kernel], modules[variant].code.get(kernel)
        # The lines of fused kernels have no barrier to tell them by.
        cost = None if code is None or isinstance(geometry, ProjectedGeometry) else line_cost(code, costs.registers)
        largest = max(runs, key=lambda run: run.blocks)
        shared = costs.shared_bytes + max(run.shared_bytes for run in runs)
        resident = device.resident(costs.registers, largest.threads, shared)
        own = ratios.get(kernel) if reason is None else None
        least = estimate_all(
            runs,
            device,
            cost,
            resident,
            None if own is None else own * geometry.floor_bytes(backward),
        )
        held = resident * -(-largest.threads // 32) * 32
        reports.append(
            KernelReport(
                kernel=kernel,
                dtype=str(geometry.dtype).removeprefix("torch."),
                regime=variant.regime,
                arch=arch,
                registers=costs.registers,
                shared_bytes=shared,
                stack_bytes=costs.stack_bytes,
                spill_bytes=costs.spill_bytes,
                occupancy=round(held / device.held_threads, 4),
                bytes_ratio=None if total is None else round(total, 4),
                predicted_ms=_rounded(least.milliseconds),
                bound=least.bound,
                bytes_ms=_rounded(least.bytes_ms),
                issue_ms=_rounded(least.issue_ms),
                special_ms=_rounded(least.special_ms),
                latency_ms=_rounded(least.latency_ms),
                code_bytes=None if code is None else code.bytes,
                instructions=None
                if code is None or cost is None
                else {kind: round(count / variant.vector, 2) for kind, count in code.instructions.items()},
                kernel_bytes_ratio=None if own is None else round(own, 4),
                launches=len(runs),
                blocks=largest.blocks,
                waves=round(least.waves, 3),
                reason=reason,
            )
        )
    return reports


def _scans(shape: Sequence[int], dtype: torch.dtype, device: Device) -> Iterator[Call]:
    """Yield both passes of a scan [B, H, W, C, G] in four directions, forward first."""
    batch, height, width, channels, groups = shape
    alignment = next(power for power in (8, 4, 2, 1) if channels % power == 0 and groups % power == 0)
    geometry = Geometry(dtype, batch, height, width, channels, groups, (0, 1, 2, 3), 0, alignment)
    for backward in (False, True):
        yield geometry, plan(geometry, device, backward)


def _projected_scans(shape: Sequence[int], proxy_channels: int, dtype: torch.dtype, device: Device) -> Iterator[Call]:
    """The same of a projected scan with a skip; raises ValueError for what the fused kernels do not take."""
    if dtype not in FUSED_DTYPES:
        raise ValueError(f"{str(dtype).removeprefix('torch.')} runs through memory, not by fused kernels")
    batch, height, width, channels, groups = shape
    vector = 4 if channels % 4 == proxy_channels % 4 == 0 else 1
    sizes = (batch, height, width, channels, groups, proxy_channels, (0, 1, 2, 3), 0)
    geometry = ProjectedGeometry(dtype, *sizes, vector=vector, skip=True)
    for backward in (False, True):
        todo = (plan_backward if backward else plan_forward)(geometry, device)
        if isinstance(todo, str):
            raise ValueError(f"the {'backward' if backward else 'forward'} pass runs through memory: {todo}")
        yield geometry, todo


def inspect(
    arch: str,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] | None = None,
    *,
    proxy_channels: int | None = None,
    bandwidth_gbs: float | None = None,
    clock_ghz: float | None = None,
    most_counted: int = COUNTED_VALUES,
) -> list[KernelReport]:
    """Compile and run what a scan [B, H, W, C] with G groups launches, in four directions; needs CuPy, no GPU.

    With `proxy_channels`, the fused kernels of a projected scan with a skip. Bandwidth and clock are the
    architecture's unless given; dtypes are all that the kernels take.

    Raises:
        ValueError: fused kernels do not take the call.
    """
    device = ARCHITECTURES[arch]
    device = replace(
        device, bandwidth_gbs=bandwidth_gbs or device.bandwidth_gbs, clock_ghz=clock_ghz or device.clock_ghz
    )
    modules = _Modules(arch)
    reports = []
    for dtype in dtypes or (STORAGE_DTYPES if proxy_channels is None else FUSED_DTYPES):
        calls = (
            _scans(shape, dtype, device)
            if proxy_channels is None
            else _projected_scans(shape, proxy_channels, dtype, device)
        )
        for backward, call in enumerate(calls):
            reports += _report(call, arch, device, bool(backward), modules, most_counted)
    return reports


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 5 or min(numbers) < 1 or numbers[3] % numbers[4]:
        raise ValueError
    return numbers


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"inspect: error: {message}\n")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m gspn_dit.ops.inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", default="sm_90", choices=ARCHITECTURES, help="GPU architecture to compile for")
    parser.add_argument("--shape", default="32,16,16,1152,1152", help="B,H,W,C,G: x is [B, H, W, C], G divides C")
    parser.add_argument("--proxy-channels", type=int, help="the fused kernels of a projected scan of so many")
    names = [str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES]
    parser.add_argument("--dtype", choices=names, action="append", help="only this dtype; may be repeated")
    parser.add_argument("--bandwidth-gbs", type=float, help="memory bandwidth, GB/s; the architecture's unless given")
    parser.add_argument("--clock-ghz", type=float, help="multiprocessors' clock, GHz; the architecture's unless given")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    options = parser.parse_args(arguments)
    try:
        options.shape = _shape(options.shape)
    except ValueError:
        parser.error(f"--shape {options.shape}: give five positive numbers B,H,W,C,G; G divides C")
    for name, value in (("bandwidth-gbs", options.bandwidth_gbs), ("clock-ghz", options.clock_ghz)):
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} is {value}, but must be a positive number")
    if options.proxy_channels is not None and options.proxy_channels < 1:
        parser.error(f"--proxy-channels is {options.proxy_channels}, but must be a positive number")
    options.dtypes = [getattr(torch, name) for name in options.dtype or ()]
    return options


def _table(reports: Sequence[KernelReport]) -> str:
    names = ["kernel", "dtype", "regime", "registers", "shared_bytes", "stack_bytes", "spill_bytes", "occupancy"]
    names += ["bytes_ratio", "predicted_ms", "bound", "code_bytes", "launches", "blocks", "waves"]
    rows = [names, *([str(getattr(report, name)) for name in names] for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report; one line and exit code 2 where it cannot be made."""
    options = _arguments(arguments)
    try:
        reports = inspect(
            options.arch,
            options.shape,
            options.dtypes,
            proxy_channels=options.proxy_channels,
            bandwidth_gbs=options.bandwidth_gbs,
            clock_ghz=options.clock_ghz,
        )
    except ValueError as error:
        print(f"inspect: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        major = (torch.version.cuda or "13").split(".")[0]
        why = " ".join(str(error).split())
        print(
            f"inspect: error: CuPy's NVRTC compiles the kernels ({why}): pip install 'cupy-cuda{major}x[ctk]'",
            file=sys.stderr,
        )
        sys.exit(2)
    print(json.dumps([asdict(report) for report in reports], indent=2) if options.json else _table(reports))


if __name__ == "__main__":
    main()
