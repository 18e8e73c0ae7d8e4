"""The CUDA kernels compile for GPUs with NVRTC alone, without spills, and the inspector reports them."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspn_dit.ops import inspect
from gspn_dit.ops.cuda import sass
from gspn_dit.ops.cuda.estimate import LineCost, planned_cost
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.sources import CUPY_OPTIONS, compile_cubin, compile_options, compile_ptx
from gspn_dit.ops.cuda.types import Variant, widest_vector
from tests.ops.scan_cases import DTYPES

pytest.importorskip("cupy", reason="CuPy brings the way to NVRTC: pip install cupy-cuda13x", exc_type=ImportError)

ROOT = Path(__file__).parents[3]
FIELDS = ["kernel", "dtype", "regime", "arch", "registers", "shared_bytes", "stack_bytes", "spill_bytes", "occupancy"]
FIELDS += ["bytes_ratio", "predicted_ms"]


def variants() -> Iterator[Variant]:
    regimes = ("short", "cluster", "wide", "long", "finish")
    for regime, dtype, shared, backward in itertools.product(regimes, DTYPES, (False, True), (False, True)):
        for vector in sorted({1, widest_vector(regime, dtype, backward)}) if backward or regime != "finish" else ():
            yield Variant(regime, dtype, vector, shared, backward=backward)


def check(variant: Variant, arch: str) -> None:
    """Compile; float32 and bfloat16 use no stack and spill nothing, float16 next to nothing."""
    cubin, log = compile_cubin(variant, arch)
    assert cubin.startswith(b"\x7fELF")
    resources = inspect.parse_log(log)
    assert set(resources) == set(variant.kernels)
    if sass.disassembler() is not None:
        for kernel, code in sass.read_code(cubin, variant).items():
            assert code.bytes <= 96 * 1024 or variant.dtype == torch.float64, (kernel, code.bytes)
            assert "generic" not in code.instructions, kernel
            whole = variant.vector == widest_vector(variant.regime, variant.dtype, variant.backward)
            plain = variant.regime != "finish" and variant.dtype != torch.float16 and not variant.shared_weights
            if arch == "sm_90" and whole and plain:
                check_planned(variant, kernel, inspect.line_cost(code, resources[kernel].registers))
    for kernel, costs in resources.items():
        assert 16 <= costs.registers <= 255
        if variant.dtype in (torch.float32, torch.bfloat16):
            assert (costs.stack_bytes, costs.spill_bytes) == (0, 0), (kernel, costs)
        elif variant.dtype == torch.float16:
            assert costs.spill_bytes <= 32, (kernel, costs)


def check_planned(variant: Variant, kernel: str, found: LineCost) -> None:
    """Plans reckon with what the machine code says, as far as one figure serves all variants."""
    planned, wide = planned_cost(variant, kernel), variant.dtype == torch.float64
    assert planned.instructions == pytest.approx(found.instructions, rel=0.35 if wide else 0.2), kernel
    assert wide or planned.special == pytest.approx(found.special, rel=0.2), kernel
    assert planned.steps == found.steps and planned.registers >= found.registers, kernel
    if variant.regime in ("short", "cluster") and not variant.backward and not wide:
        assert found.special == 4 * variant.vector  # an integer division would take one more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("regime", ["short", "cluster", "wide", "long"])
def test_compiles_for_sm_90(regime: str, backward: bool, dtype: torch.dtype) -> None:
    check(Variant(regime, dtype, widest_vector(regime, dtype, backward), False, backward=backward), "sm_90")


@pytest.mark.skipif(sass.disassembler() is None, reason="nvdisasm reads machine code: pip install triton")
def test_a_line_of_a_short_plane_takes_few_instructions() -> None:
    """65% at most of 225 instructions for a line of two channels per thread, and no generic loads."""
    variant = Variant("short", torch.bfloat16, 4, False)
    code = sass.read_code(compile_cubin(variant, "sm_90")[0], variant)["gspn_scan_forward_kernel"]
    assert sum(code.instructions.values()) / variant.vector <= 0.65 * 225 / 2
    assert code.instructions["special"] == 4 * variant.vector  # three powers and a reciprocal per channel
    assert code.instructions["global"] == 5  # three logits and two gates


def test_waiting_for_neighbours_keeps_the_first_cache() -> None:
    """What is awaited lies in a block's own shared memory: acquired for the cluster, it would empty the L1 cache."""
    ptx = compile_ptx(Variant("cluster", torch.bfloat16, 4, False), "compute_90")
    assert "mbarrier.try_wait.parity.acquire.cta" in ptx
    lines = [line for line in ptx.splitlines() if "acquire" in line and "acquire.cta" not in line]
    assert lines and all("barrier.cluster.wait" in line for line in lines)


def test_the_options_are_those_that_cupy_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked here without a GPU must be the binary that runs on one."""
    from cupy.cuda import compiler

    class Stop(Exception):
        pass

    def note(program: object, options: tuple[str, ...], log_stream: object = None) -> None:
        raise Stop(options)

    monkeypatch.setattr(compiler._NVRTCProgram, "compile", note)
    monkeypatch.setattr(compiler, "_preprocess", lambda *arguments: "")
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin"))
    variant = Variant("short", torch.float32, 2, False)
    with pytest.raises(Stop) as stopped:
        compiler._compile_with_cache_cuda("", compile_options(variant), "90", cache_in_memory=True)
    passed = [option for option in stopped.value.args[0] if not re.match("-+(gpu-)?arch", option)]
    assert sorted(passed) == sorted((*compile_options(variant), *CUPY_OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_compiles_everywhere(variant: Variant, arch: str) -> None:
    if variant.regime in ("cluster", "wide") and arch == "sm_80":
        pytest.skip("sm_80 has no clusters: its launch rule takes long lines instead")
    check(variant, arch)


@pytest.mark.skipif(harness.compiler() is None and not os.environ.get("CI"), reason="g++ counts the bytes")
def test_inspector_prints_what_a_scan_costs() -> None:
    command = [sys.executable, "-m", "gspn_dit.ops.inspect", "--arch", "sm_90", "--shape", "2,8,8,64,64", "--json"]
    done = subprocess.run([*command, "--dtype", "bfloat16"], cwd=ROOT, capture_output=True, text=True, check=True)
    reports = json.loads(done.stdout)
    assert [report["kernel"].split("_")[2] for report in reports] == ["forward", "backward", "merge"]
    for report in reports:
        assert list(report)[: len(FIELDS)] == FIELDS
        assert (report["dtype"], report["arch"]) == ("bfloat16", "sm_90")
        assert (report["stack_bytes"], report["spill_bytes"]) == (0, 0)
        assert 0 < report["occupancy"] <= 1
        assert 0.85 < report["bytes_ratio"] < 1.05
        assert report["reason"] is None
    floor, drawn = 2 * 8 * 8 * 22 * 64 * 2, reports[0]["blocks"] / (0.7 * 132)  # too few blocks for the whole bandwidth
    assert reports[0]["bytes_ms"] == pytest.approx(reports[0]["bytes_ratio"] * floor / (3350e6 * drawn), rel=0.1)
    for report in reports:
        times = [report[f"{name}_ms"] for name in ("bytes", "issue", "special", "latency")]
        assert report["predicted_ms"] == max(time for time in times if time is not None)
        assert report["predicted_ms"] == report[f"{report['bound']}_ms"]


def test_inspector_says_why_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "compiler", lambda: None)
    report = inspect.inspect("sm_90", (1, 4, 4, 8, 8), [torch.float32])[0]
    assert report.bytes_ratio is report.predicted_ms is None
    assert report.reason == "g++ is not installed: apt-get install g++"


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,4,x", "1,4,4,6,4", "0,4,4,6,6"])
def test_inspector_refuses_a_bad_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        inspect.main(["--shape", shape])
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--bandwidth-gbs", "0"], ["--clock-ghz", "nan"], ["--arch", "sm_91"], ["--arc", "sm_90"]]
)
def test_a_mistake_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        inspect.main(arguments)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("inspect: error: ") and error.count("\n") == 1


def test_parses_the_assembler_log() -> None:
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "ptxas         .     40 bytes stack frame, 44 bytes spill stores, 76 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 128 bytes smem\n"
    )
    assert inspect.parse_log(log) == {"k": inspect.Resources(128, 128, 40, 120)}
