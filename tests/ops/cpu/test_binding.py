"""Around the CPU kernels: which ones run, threads of a forked child, the memory of outputs, floating-point modes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gspn_dit.errors import run_cli
from gspn_dit.ops import BackendUnavailableError, gspn_scan
from gspn_dit.ops.cpu import binding as cpu
from tests.ops.scan_cases import make_inputs, scan_and_gradients


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


def test_denormal_mode_stays() -> None:
    tiny = torch.full((64,), 1e-40)
    inputs = make_inputs((2, 4, 4, 16))
    scan_and_gradients(inputs, inputs.x, backend="cpu")
    assert (tiny * 1.0 != 0).all()
    if torch.set_flush_denormal(True):
        try:
            scan_and_gradients(inputs, inputs.x, backend="cpu")
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


@pytest.mark.parametrize("name", cpu.KERNELS)
def test_kernels_are_chosen_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.KERNELS_VARIABLE, raising=False)
    available = cpu.available_kernels()
    assert cpu.chosen_kernels() == available[-1]
    monkeypatch.setenv(cpu.KERNELS_VARIABLE, name)
    if name in available:
        assert cpu.chosen_kernels() == name
    else:
        with pytest.raises(BackendUnavailableError, match=f"^GSPN_CPU_KERNELS is '{name}', but what can run here is "):
            cpu.chosen_kernels()


def test_instruction_sets_are_not_one_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the variable names does run: fused products and wider sums over a group leave different last bits."""
    inputs, gradients = make_inputs((2, 8, 8, 96), 3), []
    for name in cpu.available_kernels():
        if name == "amx":
            continue  # its own kernels are of the projected scan
        monkeypatch.setenv(cpu.KERNELS_VARIABLE, name)
        gradients.append(scan_and_gradients(inputs, torch.ones_like(inputs.x), backend="cpu")[1][1])
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(gradients))


def test_unknown_kernels_are_one_line_of_a_command() -> None:
    code = (
        "from gspn_dit.errors import run_cli\n"
        "def main():\n"
        "    from gspn_dit.ops import gspn_scan\n"
        "    from tests.ops.scan_cases import make_inputs\n"
        "    gspn_scan(*make_inputs((1, 2, 3, 4)))\n"
        "run_cli(main)"
    )
    environment = {**os.environ, cpu.KERNELS_VARIABLE: "sse9"}
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    names = ", ".join(cpu.available_kernels())
    assert done.stderr == (
        f"-c: error: GSPN_CPU_KERNELS is 'sse9', but what can run here is {names}: unset it or name one of these\n"
    )


def test_without_the_library_the_line_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((1, 4, 5, 8))
    expected = gspn_scan(*inputs, backend="cpu")
    monkeypatch.setenv(cpu.KERNELS_VARIABLE, "pytorch")
    assert cpu.describe() == "line-by-line PyTorch kernels (GSPN_CPU_KERNELS=pytorch)"
    monkeypatch.delenv(cpu.KERNELS_VARIABLE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "EXTENSION_SUFFIXES", [".missing"])
            cpu.load.cache_clear()
            assert cpu.describe().startswith(
                "line-by-line PyTorch kernels; for the compiled ones install a C++ compiler"
            )
            assert torch.allclose(gspn_scan(*inputs, backend="cpu"), expected, atol=1e-5)
            patch.setenv(cpu.KERNELS_VARIABLE, "avx2")
            with pytest.raises(
                BackendUnavailableError, match=r"what can run here is pytorch .*install a C\+\+ compiler"
            ):
                gspn_scan(*inputs, backend="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_INTERFACE", -1)
            cpu.load.cache_clear()
            assert "out of date" in cpu.describe()
    finally:
        cpu.load.cache_clear()


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
