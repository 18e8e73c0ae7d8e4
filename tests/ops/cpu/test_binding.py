"""The compiled CPU kernels: against the reference where the contract tests do not reach, threads, memory, fallback."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gspn_dit.errors import run_cli
from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.cpu import binding as cpu
from gspn_dit.ops.cpu.memory import OutputMemory
from tests.ops.scan_cases import DTYPES, Inputs, check_against_reference, make_inputs, scan_and_gradients


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skip where no compiler could build the kernels; fail where one could have."""
    if cpu.describe().startswith("compiled kernels"):
        return
    if shutil.which("g++") or shutil.which("clang++"):
        pytest.fail(f"a compiler is here, but {cpu.describe()}")
    pytest.skip(cpu.describe())


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(inputs: Inputs, directions: tuple[str, ...] = DIRECTIONS, window: int | None = None) -> list[Tensor]:
    grad_y = torch.cos(torch.arange(inputs.x.numel(), dtype=torch.float32)).view(inputs.x.shape).to(inputs.x.dtype)
    y, gradients = scan_and_gradients(inputs, grad_y, directions, window, "cpu")
    return [y, *gradients]


CASES = [
    # shape, groups, directions, window, strides
    ((1, 1, 1, 1), None, DIRECTIONS, None, "contiguous"),
    ((2, 1, 9, 33), None, DIRECTIONS, None, "contiguous"),
    ((1, 9, 1, 31), None, DIRECTIONS, 4, "permuted"),
    ((3, 5, 7, 16), None, ("up", "left"), None, "sliced"),
    ((1, 7, 5, 52), None, ("left",), 2, "expanded"),
    ((2, 6, 8, 130), None, ("down", "right", "up"), 3, "contiguous"),
    ((2, 6, 5, 48), 3, DIRECTIONS, None, "contiguous"),
    ((1, 4, 6, 34), 2, DIRECTIONS, 2, "permuted"),
    ((2, 3, 4, 24), 12, ("right", "up"), None, "expanded"),
    ((1, 3, 2, 1536), 1, DIRECTIONS, None, "contiguous"),
    ((1, 2, 3, 2100), 2, ("left", "down"), 2, "sliced"),
    ((1, 3, 4, 600), None, DIRECTIONS, None, "contiguous"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'x'.join(map(str, case[0]))}-{case[1]}-{case[3]}-{case[4]}")
def test_odd_shapes(case: tuple, dtype: torch.dtype) -> None:
    shape, groups, directions, window, strides = case
    merge = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs(shape, groups, len(directions), dtype, strides=strides, merge=merge, seed=len(directions))
    check_against_reference(inputs, directions, window, backend="cpu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("groups", (None, 2))
def test_gradients_that_go_past_the_caches(
    dtype: torch.dtype, groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs((2, 4, 5, 704), groups, dtype=dtype)
    cached = run(inputs)
    monkeypatch.setattr(cpu, "STREAM_BYTES", 0)
    check_against_reference(inputs, backend="cpu")
    for value, same in zip(run(inputs), cached):
        assert torch.equal(value, same)


def test_results_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((2, 6, 7, 200))
    expected = run(inputs)
    for block in (16, 48, 128):
        monkeypatch.setattr(cpu, "BLOCK", block)
        for value, same in zip(run(inputs), expected):
            assert torch.equal(value, same)


@pytest.mark.parametrize(
    "values", [(-120.0,), (120.0,), (-120.0, 120.0), (-3e38, 3e38), (-3e38,), (-17.0, -40.0, 20.0)]
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_extreme_logits(values: tuple[float, ...], dtype: torch.dtype) -> None:
    merge = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs((1, 6, 5, 40), dtype=dtype, merge=merge)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(values), inputs.weight_logits.shape, generator=generator)
    inputs = inputs._replace(weight_logits=torch.tensor(values, dtype=torch.float64)[chosen].to(dtype))
    check_against_reference(inputs, backend="cpu")


@pytest.mark.parametrize("shift", (0.0, 15.9, 60.0, 1000.0))
def test_equal_differences_below_zero_give_equal_weights(shift: float) -> None:
    """Far below zero a weight depends on differences of logits alone; near the switch nothing jumps."""
    inputs = make_inputs((1, 5, 5, 24))
    logits = inputs.weight_logits.clamp(-3, 3)
    far = inputs._replace(weight_logits=logits - 40.0 - shift)
    expected = gspn_scan(*far.wide(), backend="reference")
    assert torch.allclose(gspn_scan(*far, backend="cpu").double(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((1, 9, 7, 200), None, torch.float32),
        ((1, 5, 6, 200), None, torch.bfloat16),
        ((3, 6, 5, 72), None, torch.float16),
        ((1, 6, 5, 1536), 1, torch.float32),
        ((2, 5, 4, 96), 4, torch.float64),
    ],
)
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_threads(shape: tuple, groups: int | None, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, groups, dtype=dtype)
    torch.set_num_threads(1)
    expected = run(inputs)
    for count in (2, 3):
        torch.set_num_threads(count)
        for value, one in zip(run(inputs), expected):
            assert torch.equal(value, one)


def test_nan_and_infinity_go_where_the_reference_sends_them() -> None:
    for value in (math.nan, math.inf):
        for name in ("x", "weight_logits", "input_gate", "output_gate"):
            if name == "weight_logits" and value == math.inf:
                continue  # an infinite logit is outside of the contract
            inputs = make_inputs((1, 5, 6, 20))
            getattr(inputs, name)[:, 2, 3, ..., 7] = value
            grad_y = torch.ones_like(inputs.x)
            ours, theirs = (scan_and_gradients(inputs, grad_y, backend=which) for which in ("cpu", "reference"))
            for mine, truth in zip((ours[0], *ours[1]), (theirs[0], *theirs[1])):
                assert torch.equal(mine.isfinite(), truth.isfinite()), (name, value)
            assert torch.equal(ours[0].isnan(), theirs[0].isnan()), (name, value)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_nan_survives_half_precision_storage(dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 3, 3, 16), dtype=dtype)
    bits = torch.tensor([0x7FFF], dtype=torch.int32).to(torch.int16)  # all ones: rounding up would overflow it
    inputs.x[0, 1, 1] = bits.view(dtype)
    assert gspn_scan(*inputs, backend="cpu")[0, 1, 1].isnan().all()


@pytest.mark.parametrize("groups", (20, 4))
def test_unused_logits_reach_nothing(groups: int) -> None:
    clean = make_inputs((2, 6, 5, 20), groups, directions=1)
    dirty = clean._replace(weight_logits=clean.weight_logits.clone())
    first_lines = [0, 2, 4]  # "down", window 2
    dirty.weight_logits[:, first_lines] = math.nan
    dirty.weight_logits[:, :, 0, :, 0] = math.nan
    dirty.weight_logits[:, :, -1, :, 2] = math.inf
    for mine, truth in zip(run(dirty, ("down",), 2), run(clean, ("down",), 2)):
        assert torch.equal(mine, truth)
    gradient = run(dirty, ("down",), 2)[2]
    assert (gradient[:, first_lines] == 0).all()
    assert (gradient[:, :, 0, :, 0] == 0).all()
    assert (gradient[:, :, -1, :, 2] == 0).all()


def test_denormal_mode_stays() -> None:
    tiny = torch.full((64,), 1e-40)
    inputs = make_inputs((2, 4, 4, 16))
    run(inputs)
    assert (tiny * 1.0 != 0).all()
    if torch.set_flush_denormal(True):
        try:
            run(inputs)
            assert (tiny * 1.0 == 0).all()
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.usefixtures("threads")
def test_a_forked_child_does_not_wait_for_threads_it_lacks() -> None:
    torch.set_num_threads(2)
    inputs = make_inputs((4, 6, 5, 64))
    torch.use_deterministic_algorithms(False)  # the fill of fresh memory is itself parallel and hangs in a child
    merge = torch.ones(4)

    def forward() -> Tensor:
        return cpu.scan_forward(*inputs[:4], merge, [0, 1, 2, 3], 0)

    expected = forward()
    child = os.fork()
    if child == 0:
        os._exit(0 if bool((forward() == expected).numpy().all()) else 1)
    deadline = time.monotonic() + 20
    while (result := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if result == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(result[1]) == 0


def test_without_the_library_the_line_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((1, 4, 5, 8))
    expected = gspn_scan(*inputs, backend="cpu")
    monkeypatch.setenv(cpu.DISABLE_VARIABLE, "pytorch")
    cpu._load.cache_clear()
    try:
        assert cpu.describe().startswith("line-by-line PyTorch kernels")
        assert torch.allclose(gspn_scan(*inputs, backend="cpu"), expected, atol=1e-5)
        monkeypatch.delenv(cpu.DISABLE_VARIABLE)
        cpu._load.cache_clear()
        monkeypatch.setattr(cpu, "EXTENSION_SUFFIXES", [".missing"])
        assert "install a C++ compiler" in cpu.describe()
        cpu._load.cache_clear()
        monkeypatch.undo()
        monkeypatch.setattr(cpu, "_INTERFACE", -1)
        assert "out of date" in cpu.describe()
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def test_memory_of_large_outputs_is_used_again_but_never_shared() -> None:
    inputs = make_inputs((1, 32, 32, 1152), directions=1, merge=None)
    cpu.output_memory.release()

    def forward() -> Tensor:
        return gspn_scan(*inputs, directions=("down",), backend="cpu")

    first = forward()
    kept, second = first.clone(), forward()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    address = first.data_ptr()
    view = first[0, 0]
    del first
    assert cpu.output_memory.idle_bytes() == 0
    del view
    assert cpu.output_memory.idle_bytes() > 0
    assert forward().data_ptr() == address
    del second
    idle = cpu.output_memory.idle_bytes()
    assert 2 * kept.nbytes <= idle < 3 * kept.nbytes, "the two that were in use at once"
    both = forward(), forward()
    del both
    assert cpu.output_memory.idle_bytes() == idle
    cpu.output_memory.release()
    assert cpu.output_memory.idle_bytes() == 0


def test_memory_of_two_sizes_is_kept_when_asked_for() -> None:
    """Without `keep` the second size takes the place of the first."""
    memory, shapes = OutputMemory(), [torch.Size([6 << 20]), torch.Size([2 << 20])]
    sizes = [4 * shape.numel() for shape in shapes]

    def use_both() -> int:
        for shape in shapes:
            memory.empty([shape], torch.float32)
        return memory.idle_bytes()

    assert use_both() == sizes[1]
    memory.release()
    memory.keep(sum(sizes))
    assert use_both() == sum(sizes)


CHECK = """
import torch
from tests.ops.scan_cases import check_against_reference, make_inputs
from gspn_dit.ops.cpu import binding as cpu
print(cpu.describe())
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    merge = torch.float64 if dtype == torch.float64 else torch.float32
    check_against_reference(make_inputs((2, 4, 5, 37), dtype=dtype, merge=merge), backend="cpu")
    check_against_reference(make_inputs((1, 5, 4, 36), 4, dtype=dtype, merge=merge), window=2, backend="cpu")
for low in (-120.0, -3e38):
    inputs = make_inputs((1, 5, 4, 19))
    inputs.weight_logits[:, :, ::2] = low
    check_against_reference(inputs, backend="cpu")
"""


def test_the_slowest_instruction_set_is_right_too() -> None:
    environment = {**os.environ, "GSPN_CPU_ISA": "baseline"}
    result = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "baseline" in result.stdout


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_commands_ask_for_huge_pages_unless_told_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    found: list[str | None] = []
    run_cli(lambda: found.append(os.environ.get("THP_MEM_ALLOC_ENABLE")))
    assert found == [expected]
