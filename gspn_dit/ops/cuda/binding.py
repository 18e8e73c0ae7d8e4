"""The CUDA kernels of the operator pair, compiled and launched through CuPy.

CuPy is imported when the first CUDA tensor comes by, never before: data workers fork. Memory is torch's, launches go to
torch's current stream, and nothing between them waits or allocates, so that CUDA graphs capture a scan.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.ops.cuda.devices import CLUSTER_BLOCKS, Device, fewest_clusters, has_clusters
from gspn_dit.ops.cuda.projected import Gradients, run_projected_backward, run_projected_forward
from gspn_dit.ops.cuda.run import run_backward, run_forward
from gspn_dit.ops.cuda.sources import compile_options, source_text
from gspn_dit.ops.cuda.types import Launch, Variant
from gspn_dit.ops.materialised import projected_backward as materialised_backward
from gspn_dit.ops.materialised import projected_forward as materialised_forward


def problem() -> str | None:
    """Return why the CuPy backend cannot run here and what to do, in one line, or None if it can."""
    return _problem()


@cache
def _problem() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build from https://pytorch.org/get-started/locally"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device: run where `nvidia-smi` lists one"
    major = int(torch.version.cuda.split(".")[0])
    wanted = f"cupy-cuda{major}x"
    try:
        cupy = importlib.import_module("cupy")
        runtime = cupy.cuda.runtime.runtimeGetVersion()
    except ImportError as error:
        why = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed: pip install {wanted}"
        return f"CuPy cannot be imported ({why}): pip install --force-reinstall {wanted}"
    if runtime // 1000 != major:
        installed = " ".join(_cupy_packages()) or "cupy"
        return (
            f"CuPy is built for CUDA {runtime // 1000} but PyTorch for CUDA {major}: "
            f"pip uninstall -y {installed} && pip install {wanted}"
        )
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        why = " ".join(str(error).split())
        return f"CuPy does not find NVRTC ({why}): pip install '{wanted}[ctk]'"
    return None


@dataclass(frozen=True)
class Toolchain:
    """What compiles the kernels here, with a GPU or without."""

    cupy: str
    nvrtc: str
    architectures: tuple[str, ...]
    """Of the GPUs that PyTorch sees, such as "sm_90"."""
    cache_directory: str
    """Where CuPy keeps compiled kernels."""


def toolchain() -> Toolchain:
    """Ask CuPy, NVRTC and PyTorch; raises ImportError without CuPy, or whatever a broken installation raises."""
    cupy = importlib.import_module("cupy")
    nvrtc = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    architectures = {"sm_{}{}".format(*torch.cuda.get_device_capability(index)): None for index in gpus}
    folder = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    return Toolchain(cupy.__version__, nvrtc, tuple(architectures), folder)


def describe() -> str:
    """Say in one line what runs the kernels: CuPy, NVRTC, the GPUs and their clusters, where compiled ones are kept."""
    tools = toolchain()
    parts = [f"CUDA kernels through CuPy {tools.cupy}", f"NVRTC {tools.nvrtc}", *tools.architectures]
    for index in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        with _current(torch.device("cuda", index)):
            device = _device(index)
            if device.clusters:
                found = _clusters(index, device.shared_bytes)
                parts.append(f"{found.count} clusters of {CLUSTER_BLOCKS} blocks at once {found.source}")
    return ", ".join([*parts, f"compiled ones in {tools.cache_directory}"])


# torch.compile takes the answer as a constant: this is what torch.compiler.assume_constant_result sets, without
# importing the compiler.
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cupy_packages() -> list[str]:
    """Names of the installed distributions of CuPy."""
    names = (distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions())
    return sorted({name for name in names if name == "cupy" or name.startswith("cupy-cuda")})


CLUSTER_PROBE = f'extern "C" __global__ void __cluster_dims__({CLUSTER_BLOCKS}, 1, 1) gspn_cluster_probe() {{}}\n'
"""A kernel that does nothing, by which the driver is asked how many clusters run at once."""


@cache
def _device(index: int) -> Device:
    """Limits and rates of a GPU; the caller has made it current."""
    gpu = torch.cuda.get_device_properties(index)
    runtime = importlib.import_module("cupy").cuda.runtime  # PyTorch 2.6 does not tell what follows

    def attribute(name: str) -> int:
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), index))

    usual = Device()
    # Twice a clock, of a memory that moves its width twice; 0 where a virtual GPU does not tell.
    bytes_per_ms = 2 * attribute("MemoryClockRate") * attribute("GlobalMemoryBusWidth") / 8
    shared_bytes = attribute("MaxSharedMemoryPerBlockOptin")
    return Device(
        shared_bytes,
        gpu.multi_processor_count,
        clusters=_clusters(index, shared_bytes).count if has_clusters(gpu.major) else 0,
        tensor_cores=gpu.major >= 8,
        held_shared_bytes=attribute("MaxSharedMemoryPerMultiprocessor"),
        held_threads=gpu.max_threads_per_multi_processor,
        held_blocks=attribute("MaxBlocksPerMultiprocessor"),
        registers=attribute("MaxRegistersPerMultiprocessor"),
        bandwidth_gbs=bytes_per_ms / 1e6 or usual.bandwidth_gbs,
        clock_ghz=attribute("ClockRate") / 1e6 or usual.clock_ghz,
    )


@dataclass(frozen=True)
class Clusters:
    """How many clusters of eight blocks run at once, where a block fills a multiprocessor, and who says so."""

    count: int
    source: str
    """"by the driver", or "assumed" and why."""


@cache
def _clusters(index: int, shared_bytes: int) -> Clusters:
    """Ask the driver of a GPU that has clusters, else assume the fewest; the caller has made the GPU current.

    CuPy 14 has no name for `cuOccupancyMaxActiveClusters`: NVIDIA's own bindings have, where they are installed.
    """
    try:
        return Clusters(_active_clusters(shared_bytes), "by the driver")
    except (ImportError, RuntimeError) as error:
        fewest = fewest_clusters(torch.cuda.get_device_properties(index).multi_processor_count)
        return Clusters(fewest, f"assumed, as the driver cannot be asked ({' '.join(str(error).split())})")


def _active_clusters(shared_bytes: int) -> int:
    driver = importlib.import_module("cuda.bindings.driver")
    kernel = importlib.import_module("cupy").RawModule(code=CLUSTER_PROBE).get_function("gspn_cluster_probe")
    kernel.max_dynamic_shared_size_bytes = shared_bytes
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = CLUSTER_BLOCKS, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 256, 1, 1
    config.sharedMemBytes = shared_bytes
    error, count = driver.cuOccupancyMaxActiveClusters(driver.CUfunction(kernel.kernel.ptr), config)
    if error != driver.CUresult.CUDA_SUCCESS or count < 1:
        raise RuntimeError(f"{error.name}, {count} clusters")
    return int(count)


@cache
def _kernel(index: int, variant: Variant, name: str) -> Any:
    """A kernel on a GPU; CuPy keeps compiled modules on disk. The caller has made the GPU current."""
    kernel = _module(index, variant).get_function(name)
    kernel.max_dynamic_shared_size_bytes = _device(index).shared_bytes - kernel.shared_size_bytes
    return kernel


@cache
def _module(index: int, variant: Variant) -> Any:
    cupy = importlib.import_module("cupy")
    return cupy.RawModule(code=source_text(variant.source), options=compile_options(variant), backend="nvrtc")


def _launcher(index: int) -> Any:
    def launch(todo: Launch, fields: bytes, tensors: Mapping[str, Tensor]) -> None:
        kernel = _kernel(index, todo.variant, todo.kernel)
        # A structure by value: CuPy passes the memory of a one-element array of it.
        argument = np.frombuffer(bytearray(fields), dtype=[("fields", np.int64, (len(fields) // 8,))])
        kernel(todo.grid, todo.block, (argument,), shared_mem=todo.shared_bytes)

    return launch


@contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Make torch's device and its current stream CuPy's; yields the device's index."""
    index = torch.cuda.current_device() if device.index is None else device.index
    streams = importlib.import_module("cupy").cuda
    with torch.cuda.device(index):
        stream = torch.cuda.current_stream(index)
        if hasattr(streams.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
            external = streams.Stream.from_external(stream)
        else:
            external = streams.ExternalStream(stream.cuda_stream, index)
        with external:
            yield index


def _check() -> None:
    reason = problem()
    if reason is not None:
        raise RuntimeError(f"the CUDA kernels of gspn_scan cannot run: {reason}")


def scan_forward(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the scan of CUDA tensors; arguments as in the operator pair."""
    _check()
    with _current(x.device) as index:
        inputs = (x, weight_logits, input_gate, output_gate, merge_weight)
        return run_forward(*inputs, directions, window, device=_device(index), launcher=_launcher(index))


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of CUDA tensors; arguments as in the operator pair."""
    _check()
    with _current(x.device) as index:
        inputs = (grad_y, x, weight_logits, input_gate, output_gate, merge_weight)
        return run_backward(*inputs, directions, window, device=_device(index), launcher=_launcher(index))


def projected_forward(
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the projected scan of CUDA tensors, fused where the plan allows; arguments as in the operator pair.

    float32 goes through memory: without tensor cores the library's products are faster than the fused kernel's.
    """
    _check()
    arguments = (x, proxy, weights, merge_weight, skip_weight, directions, window)
    if x.dtype.itemsize == 2:
        with _current(x.device) as index:
            y = run_projected_forward(*arguments, device=_device(index), launcher=_launcher(index))
        if isinstance(y, Tensor):
            return y
    return materialised_forward(scan_forward, *arguments)


def projected_backward(
    grad_y: Tensor,
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> Gradients:
    """Return the gradients of the projected scan's tensors, [0] for no skip weight; fused as `projected_forward` is."""
    _check()
    arguments = (grad_y, x, proxy, weights, merge_weight, skip_weight, directions, window)
    if x.dtype.itemsize == 2:
        with _current(x.device) as index:
            gradients = run_projected_backward(*arguments, device=_device(index), launcher=_launcher(index))
        if not isinstance(gradients, str):
            return gradients
    return materialised_backward(scan_backward, *arguments)
