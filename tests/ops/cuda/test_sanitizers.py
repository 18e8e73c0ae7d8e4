"""The CUDA kernels under AddressSanitizer and ThreadSanitizer, and faults planted in them that must be found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from gspn_dit.ops.cuda import run
from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.types import Variant
from tests.ops.scan_cases import Inputs, make_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        harness.compiler() is None and not os.environ.get("CI"), reason="g++ builds the CUDA kernels for the host"
    ),
]

# Few threads: ThreadSanitizer runs one host thread per CUDA thread.
DEVICE = Device(threads=64)
CODES = (0, 1, 2, 3)


def record(inputs: Inputs, regime: str, window: int) -> tuple[harness.Recorder, list[torch.Tensor]]:
    """Record a forward and a backward pass; return the launches and the tensors they will write."""
    recorder = harness.Recorder()
    options = {"device": DEVICE, "launcher": recorder, "regime": regime}
    y = run.run_forward(*inputs, CODES, window, **options)  # type: ignore[arg-type]
    gradients = run.run_backward(torch.ones_like(inputs.x), *inputs, CODES, window, **options)  # type: ignore[arg-type]
    return recorder, [y, *gradients]


def expected(inputs: Inputs, regime: str, window: int) -> list[torch.Tensor]:
    options = {"device": DEVICE, "launcher": harness.Host(), "regime": regime}
    y = run.run_forward(*inputs, CODES, window, **options)  # type: ignore[arg-type]
    return [y, *run.run_backward(torch.ones_like(inputs.x), *inputs, CODES, window, **options)]  # type: ignore[arg-type]


def variants(recorder: harness.Recorder) -> list[Variant]:
    """The modules of a forward and a backward pass, in the order of their launches."""
    return list(dict.fromkeys(launch.variant for launch, _ in recorder.launches))


def small_inputs(regime: str, groups: int) -> Inputs:
    shape = {"short": (1, 4, 5, 8), "cluster": (1, 4, 18, 8), "wide": (1, 4, 18, 8), "long": (1, 3, 40, 8)}[regime]
    return make_inputs(shape, groups, dtype=torch.bfloat16)


@pytest.mark.parametrize("sanitizer", harness.SANITIZERS)
@pytest.mark.parametrize("regime", ["short", "cluster", "wide", "long"])
@pytest.mark.parametrize("groups", [8, 1])
def test_clean(sanitizer: str, regime: str, groups: int) -> None:
    inputs = small_inputs(regime, groups)
    recorder, outputs = record(inputs, regime, window=0)
    program = harness.sanitized_program(variants(recorder), sanitizer)
    done = harness.replay(program, recorder)
    assert done.returncode == 0, done.stderr
    for actual, truth in zip(outputs, expected(inputs, regime, window=0), strict=True):
        assert torch.equal(actual, truth)


FAULTS = {
    # A barrier that is missing: neighbours read a line while it is written.
    ("thread", "short", "short_lines.cu"): ("__syncthreads();  // forward line", ""),
    ("thread", "long", "long_lines.cu"): ("__syncthreads(); }  // line", "}"),
    # A block that adds to its sums while another one still swaps them for its own.
    ("thread", "cluster", "cluster.cuh"): ("cluster_barrier();  // swapped", ""),
    # A plane's last row goes past the end of shared memory, and a line's past the end of its tensor.
    ("address", "short", "short_lines.cu"): ("token < tokens;\n#pragma unroll\n", "token <= tokens;\n#pragma unroll\n"),
    ("address", "long", "long_lines.cu"): ("n < positions && n < last", "n <= positions && n < last"),
    ("address", "cluster", "cluster.cuh"): ("row < p.height && column", "row <= p.height && column"),
}


@pytest.mark.parametrize(("sanitizer", "regime", "name"), FAULTS)
def test_planted_fault_is_found(sanitizer: str, regime: str, name: str, tmp_path: Path) -> None:
    stderr = run_with_fault(regime, name, FAULTS[sanitizer, regime, name], sanitizer, tmp_path)
    assert {"thread": "data race", "address": "heap-buffer-overflow"}[sanitizer] in stderr


def test_a_block_that_does_not_wait_for_its_neighbours_is_found(tmp_path: Path) -> None:
    """It runs ahead, and a counter of arrivals is armed twice."""
    fault = ("await(counter(), turn >> 1 & 1);", "(void)0;")
    stderr = run_with_fault("cluster", "edges.cuh", fault, "thread", tmp_path)
    assert "an mbarrier has more arrivals than it counts" in stderr


def run_with_fault(regime: str, name: str, fault: tuple[str, str], sanitizer: str, folder: Path) -> str:
    """Run a regime's small case with a faulty text in the place of a sound one; return what the failed run says."""
    sources = folder / "cuda"
    shutil.copytree(harness.SOURCES, sources)
    text, (sound, faulty) = (sources / name).read_text(), fault
    assert sound in text
    (sources / name).write_text(text.replace(sound, faulty))
    inputs = small_inputs(regime, 8)
    recorder, _ = record(inputs, regime, window=0)
    program = harness.sanitized_program(variants(recorder), sanitizer, sources)
    done = harness.replay(program, recorder)
    assert done.returncode != 0
    return done.stderr
