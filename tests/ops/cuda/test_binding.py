"""Binding without a GPU: what is said when something is missing, what is imported when, how sources are found."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn_dit.ops import backends
from gspn_dit.ops.backends import BackendUnavailableError, resolve_backend
from gspn_dit.ops.contract import check_arguments
from gspn_dit.ops.cuda import binding as cuda
from gspn_dit.ops.cuda import sources
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.run import PROBLEM_BYTES
from gspn_dit.ops.cuda.types import Variant
from tests.ops.cuda.fake_cupy import FakeCupy, FakeDriver, Strict
from tests.ops.scan_cases import make_inputs

CUDA = torch.device("cuda", 0)


def fake_cupy(**options: Any) -> FakeCupy:
    return FakeCupy(pytest.importorskip("cupy", exc_type=ImportError), **options)


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine whose PyTorch has CUDA 13 and sees a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda._problem.cache_clear()
    backends._warn_once.cache_clear()
    yield monkeypatch
    cuda._problem.cache_clear()
    backends._warn_once.cache_clear()


def expect_refusal(message: str) -> None:
    """Naming the backend raises the message in one line; auto falls back and warns with it, once."""
    with pytest.raises(BackendUnavailableError) as raised:
        resolve_backend("cupy", CUDA)
    assert str(raised.value) == f"backend 'cupy' cannot run: {message}"
    with pytest.warns(RuntimeWarning) as warned:
        assert resolve_backend("auto", CUDA) == "reference"
        assert resolve_backend("auto", CUDA) == "reference"
    assert [str(warning.message) for warning in warned] == [
        f"gspn_scan falls back to the slow PyTorch reference: {message}"
    ]


def test_cupy_missing(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setitem(sys.modules, "cupy", None)
    expect_refusal("CuPy is not installed: pip install cupy-cuda13x")


def test_cupy_of_another_cuda_major(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setitem(sys.modules, "cupy", fake_cupy(runtime=12090))
    gpu_machine.setattr(cuda, "_cupy_packages", lambda: ["cupy-cuda12x"])
    expect_refusal(
        "CuPy is built for CUDA 12 but PyTorch for CUDA 13: pip uninstall -y cupy-cuda12x && pip install cupy-cuda13x"
    )


def test_nvrtc_missing(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setitem(sys.modules, "cupy", fake_cupy(nvrtc_problem="libnvrtc.so is missing"))
    expect_refusal("CuPy does not find NVRTC (libnvrtc.so is missing): pip install 'cupy-cuda13x[ctk]'")


def test_everything_there(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setitem(sys.modules, "cupy", fake_cupy())
    assert resolve_backend("auto", CUDA) == resolve_backend("cupy", CUDA) == "operator"


@pytest.fixture
def h100(gpu_machine: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    """A machine with an H100, as far as names go: launches are noted, nothing runs."""
    properties = getattr(torch._C, "_CudaDeviceProperties", None)
    if properties is None:
        pytest.skip("this PyTorch is built without CUDA and does not know the names of a GPU's properties")
    cupy = fake_cupy()
    facts = {"multi_processor_count": 132, "max_threads_per_multi_processor": 2048, "major": 9, "minor": 0}
    gpu = Strict(properties, None, **facts)
    stream = types.SimpleNamespace(cuda_stream=7, __cuda_stream__=lambda: (0, 7))
    gpu_machine.setitem(sys.modules, "cupy", cupy)
    gpu_machine.setitem(sys.modules, "cuda.bindings.driver", None)
    gpu_machine.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    gpu_machine.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu_machine.setattr(torch.cuda, "device_count", lambda: 1)
    gpu_machine.setattr(torch.cuda, "current_device", lambda: 0)
    gpu_machine.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    gpu_machine.setattr(torch.cuda, "current_stream", lambda device: stream)
    cached = (cuda._device, cuda._clusters, cuda._kernel, cuda._module)
    for function in cached:
        function.cache_clear()
    yield cupy
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("shape", [(2, 16, 16, 64), (1, 64, 64, 64), (1, 4, 700, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scan_is_launched_by_names_that_cupy_and_torch_have(
    h100: FakeCupy, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    inputs = make_inputs(shape, dtype=dtype)
    merge_weight = torch.ones(4)
    cuda.scan_forward(*inputs[:4], merge_weight, [0, 1, 2, 3], 0)
    names = {name for name, *_ in h100.launches}
    assert "gspn_scan_forward_kernel" in names
    cuda.scan_backward(inputs.x, *inputs[:4], merge_weight, [0, 1, 2, 3], 0)
    names = {name for name, *_ in h100.launches}
    assert {"gspn_scan_backward_kernel", "gspn_scan_merge_kernel"} <= names
    for _, grid, block, argument, shared_bytes in h100.launches:
        for size in (grid, block):
            assert isinstance(size, tuple) and all(type(number) is int and number > 0 for number in size)
        assert (argument.shape, argument.nbytes) == ((1,), PROBLEM_BYTES)
        assert 0 <= shared_bytes <= harness.H100.shared_bytes


def test_a_device_is_what_cupy_and_torch_say(h100: FakeCupy) -> None:
    """2 · 2619 MHz · 640 bytes; what is not told is an H100's."""
    found = cuda._device(0)
    assert found.bandwidth_gbs == pytest.approx(3352.32) and found.clock_ghz == 1.98
    assert replace(found, bandwidth_gbs=3350.0, clock_ghz=1.755) == harness.H100
    assert cuda._clusters(0, found.shared_bytes).count == 14
    assert "assumed, as the driver cannot be asked (" in cuda.describe()


@pytest.mark.parametrize(("answer", "count"), [("CUDA_SUCCESS", 15), ("CUDA_ERROR_INVALID_VALUE", 0)])
def test_the_driver_is_asked_how_many_clusters_run_at_once(
    h100: FakeCupy, monkeypatch: pytest.MonkeyPatch, answer: str, count: int
) -> None:
    """By a kernel of eight blocks that takes all shared memory; without an answer, the fewest there can be."""
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver")
    reason = "NVIDIA's bindings of the driver: pip install cuda-bindings"
    driver = FakeDriver(pytest.importorskip("cuda.bindings.driver", reason=reason), count, answer)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    assert cuda._device(0).clusters == (count or 14)
    assert f"clusters of 8 blocks at once {'by the driver' if count else 'assumed, as'}" in cuda.describe()
    ((_, config),) = driver.asked
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes) == (8, 256, harness.H100.shared_bytes)


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.bfloat16, "projected_forward"), (torch.float32, "scan_forward")])
def test_a_projected_scan_is_fused_where_tensor_cores_are(h100: FakeCupy, dtype: torch.dtype, kernels: str) -> None:
    """float32 goes through memory, whose products are PyTorch's."""
    x, proxy = torch.zeros(2, 5, 6, 8, dtype=dtype), torch.zeros(2, 5, 6, 4, dtype=dtype)
    weights = [torch.zeros(count * 8, 4, dtype=dtype) for count in (12, 4, 4)]
    y = cuda.projected_forward(x, proxy, weights, torch.ones(4), torch.zeros(8, 4, dtype=dtype), [0, 1, 2, 3], 0)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert {name for name, *_ in h100.launches} == {f"gspn_{kernels}_kernel"}
    h100.launches.clear()
    arguments = (x, proxy, weights, torch.ones(4), torch.zeros(8, 4, dtype=dtype), [0, 1, 2, 3], 0)
    gradients = cuda.projected_backward(y, *arguments)
    assert [gradient.shape for gradient in gradients[2:5]] == [weight.shape for weight in weights]
    fused = {"gspn_projected_backward_kernel", "gspn_projected_join_kernel"}
    assert ({name for name, *_ in h100.launches} == fused) == (dtype == torch.bfloat16)


def test_the_fake_has_what_cupy_has_and_no_more() -> None:
    """Each of these lines is a mistake that only a machine with a GPU used to show."""
    cupy = fake_cupy()
    attributes = cupy.cuda.Device(0).attributes
    assert attributes["MaxSharedMemoryPerBlockOptin"] == 232_448
    with pytest.raises(KeyError):
        attributes["ComputeCapabilityMajor"]
    with pytest.raises(AttributeError):
        cupy.cuda.runtime.cudaDevAttrComputeCapabilityMajor  # noqa: B018
    with pytest.raises(AttributeError):
        cupy.cuda.Stream.from_pointer(7)
    with pytest.raises(TypeError):
        cupy.RawModule("", ("--std=c++17",))
    with pytest.raises(TypeError):
        cupy.RawModule(code="", flags=())
    kernel = cupy.RawModule(code="").get_function("k")
    with pytest.raises(AttributeError):
        kernel.max_shared_bytes = 1
    with pytest.raises(TypeError):
        kernel((1,), (1,), (1,), shared=0)
    with pytest.raises(AttributeError):
        Strict(cupy, None, invented=1)


def test_no_gpu_and_no_cuda_build(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.problem() == "PyTorch sees no CUDA device: run where `nvidia-smi` lists one"
    cuda._problem.cache_clear()
    gpu_machine.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(cuda.problem())


def test_unsupported_dtype_and_mixed_devices() -> None:
    inputs = make_inputs((1, 3, 4, 2))
    whole = [tensor.to("meta") for tensor in inputs.tensors()]
    with pytest.raises(ValueError, match=r"^x has dtype torch\.int32; the scan takes torch\.float32, .*float16$"):
        check_arguments(whole[0].int(), *(t.int() for t in whole[1:]), directions=4, window=None)
    with pytest.raises(ValueError, match=r"^input_gate is on cpu, but x is on meta$"):
        check_arguments(whole[0], whole[1], inputs.input_gate, *whole[3:], directions=4, window=None)


def test_cuda_kernels_are_registered() -> None:
    for name in ("scan_forward", "scan_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gspn_dit::{name}", "CUDA")


def test_a_scan_on_the_cpu_imports_no_cupy() -> None:
    code = (
        "import sys, torch\nfrom gspn_dit import ops\nfrom tests.ops.scan_cases import make_inputs\n"
        "ops.gspn_scan(*make_inputs((1, 3, 4, 2)))\nassert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_describes_what_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", "/somewhere")
    assert re.fullmatch(
        r"CUDA kernels through CuPy [\d.]+, NVRTC [\d.]+,.* compiled ones in /somewhere", cuda.describe()
    )


def test_sources_carry_their_header() -> None:
    for regime in ("short", "cluster", "long", "finish"):
        text = sources.source_text(Variant(regime, torch.float32, 1, False).source)
        assert "#include" not in text
        assert "struct Problem" in text


def test_problem_is_a_constant_to_the_compiler() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x if cuda.problem() is None else 2 * x

    assert twice(torch.ones(1)).item() == (1.0 if cuda.problem() is None else 2.0)
