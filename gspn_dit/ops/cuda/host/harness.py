"""Builds the kernels of `cuda/` for the host with g++ and runs plans of launches on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn_dit.ops.cuda import projected, run
from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.plan import plan
from gspn_dit.ops.cuda.projected_backward_plan import plan_backward
from gspn_dit.ops.cuda.projected_plan import ProjectedGeometry, ProjectedVariant, plan_forward
from gspn_dit.ops.cuda.sources import source_folder
from gspn_dit.ops.cuda.types import POINTERS, SECTOR_BYTES, Geometry, Launch, Variant

HERE = Path(__file__).resolve().parent
SOURCES = source_folder()
H100 = Device()


def compiler() -> str | None:
    """Path of g++, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cache_folder() -> Path:
    """Where builds are kept between runs, one user's in one folder."""
    folder = Path(tempfile.gettempdir()) / f"gspn-host-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def digest(*texts: object) -> str:
    """A name for what is built from these texts."""
    return hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()[:20]


def _texts(sources: Path) -> list[str]:
    files = sorted([*sources.glob("*.cu"), *sources.glob("*.cuh"), *HERE.glob("*.h"), *HERE.glob("*.cpp")])
    return [file.read_text(encoding="utf-8") for file in files]


def build(command: list[str], name: str, key: str) -> Path:
    """Run a compiler whose last arguments name its output, unless the same was built before."""
    target = cache_folder() / f"{name}-{key}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            built = Path(folder) / "built"
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, encoding="utf-8")
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            built.rename(target)
    return target


def kernel_flags(variant: Variant, sources: Path) -> list[str]:
    """Compiler flags that pick a variant's text, kernels and macros."""
    kernels = "".join(f"KERNEL({kernel})" for kernel in variant.kernels)
    defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
    return [
        "-Wno-unknown-pragmas",
        *(f'-DKERNEL_SOURCE="{sources / variant.source}"', f"-DKERNELS={kernels}"),
        *defines,
    ]


def compile_object(source: Path, flags: Sequence[str], texts: Sequence[str]) -> Path:
    """Compile one file to an object file, unless that was done before."""
    path = compiler()
    assert path is not None, "g++ is needed to build the kernels for the host"
    command = [path, "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", *flags, "-c", str(source)]
    return build(command, source.stem, digest(*command, *texts))


def kernel_object(variant: Variant, flags: Sequence[str], sources: Path = SOURCES) -> Path:
    """Compile the kernels of one variant to an object file."""
    return compile_object(HERE / "kernels.cpp", [*kernel_flags(variant, sources), *flags], _texts(sources))


def link(objects: Sequence[Path], flags: Sequence[str], name: str) -> Path:
    """Link object files, unless that was done before; their names tell their contents."""
    path = compiler()
    assert path is not None
    command = [path, *flags, *map(str, objects)]
    return build(command, name, digest(*command))


@functools.cache
def module(variant: Variant, sources: Path = SOURCES) -> ctypes.CDLL:
    """The kernels of one variant as a shared library."""
    library = load([kernel_object(variant, ["-O1", "-ffp-contract=off"], sources)])
    library.host_cuda_problem_bytes.restype = ctypes.c_size_t
    expected = projected.PROBLEM_BYTES if isinstance(variant, ProjectedVariant) else run.PROBLEM_BYTES
    assert library.host_cuda_problem_bytes() == expected, "FIELDS and the kernels' problem differ"
    return library


def runtime_objects(flags: Sequence[str], turns: str = "fibres.cpp") -> list[Path]:
    """Compile the runtime; `turns` is how CUDA threads run: fibres.cpp, or threads.cpp for ThreadSanitizer."""
    return [compile_object(HERE / name, flags, _texts(SOURCES)) for name in ("runtime.cpp", turns)]


def load(objects: Sequence[Path]) -> ctypes.CDLL:
    """Link kernels with the runtime and load them."""
    library = ctypes.CDLL(str(link([*objects, *runtime_objects(["-O2"])], ["-shared"], "library")))
    library.host_cuda_launch.argtypes = (
        *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_size_t, ctypes.c_char_p),
    )
    library.host_cuda_message.restype = ctypes.c_char_p
    library.host_cuda_sectors.restype = ctypes.c_uint64
    library.host_cuda_schedule.argtypes = (ctypes.c_uint64,)
    return library


class Host:
    """Runs launches one after the other and counts the sectors that each kernel moves.

    A launch that fails raises RuntimeError: threads that wait for each other for ever, an address that is misaligned.
    """

    def __init__(self, sources: Path = SOURCES, schedule: int = 0) -> None:
        """Threads take turns by number with `schedule` 0, else in an order drawn from it."""
        self.sources, self.schedule = sources, schedule
        self.sectors: dict[str, int] = {}
        self.launches: list[Launch] = []

    def scans(
        self, regime: str | None = None, device: Device = H100
    ) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
        """Return the operator pair's forward and backward as this host runs them, planned for a device."""
        options = {"device": device, "launcher": self, "regime": regime}
        return functools.partial(run.run_forward, **options), functools.partial(run.run_backward, **options)  # type: ignore[arg-type]

    def library(self, variant: Variant) -> ctypes.CDLL:
        """The kernels of a variant, compiled."""
        return module(variant, self.sources)

    def __call__(self, launch: Launch, problem: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Run one launch."""
        library = self.library(launch.variant)
        grid, block = ((ctypes.c_uint * 3)(*size) for size in (launch.grid, launch.block))
        library.host_cuda_sectors(1)
        library.host_cuda_schedule(self.schedule)
        status = library.host_cuda_launch(launch.kernel.encode(), grid, block, launch.shared_bytes, problem)
        assert status != 1, f"no kernel {launch.kernel}"
        if status == 2:
            raise RuntimeError(f"{launch.kernel}: {library.host_cuda_message().decode()}")
        self.launches.append(launch)
        self.sectors[launch.kernel] = self.sectors.get(launch.kernel, 0) + library.host_cuda_sectors(1)


def aligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that start on a 512-byte boundary, as torch allocates on a GPU."""
    count, item = int(torch.tensor(shape).prod()), dtype.itemsize
    buffer = torch.zeros(count + 512 // item, dtype=dtype)
    first = -buffer.data_ptr() % 512 // item
    return buffer[first : first + count].view(shape)


def whole_sectors(geometry: Geometry, device: Device, backward: bool) -> tuple[Geometry, Device]:
    """A part of a call that moves the same bytes over the fewest possible, and a device as much smaller.

    Images of a batch are alike, and so are slabs of channels where each fills whole sectors: one image is enough, four
    where images do not begin with a sector, and one slab if it is then cut into blocks as all of them are.
    """
    image_bytes = geometry.height * geometry.width * geometry.channels * geometry.dtype.itemsize
    images = min(geometry.batch, 1 if image_bytes % SECTOR_BYTES == 0 else 4)
    part = replace(geometry, batch=images)
    device = device.share(images, geometry.batch)
    launches = plan(part, device, backward).launches
    slab = launches[0].fields["slab"]
    assert isinstance(slab, int)
    if geometry.groups < geometry.channels or geometry.channels % slab or slab * geometry.dtype.itemsize % SECTOR_BYTES:
        return part, device
    one = replace(part, channels=slab, groups=slab)
    smaller = device.share(slab, geometry.channels)

    def cut(launches: Sequence[Launch]) -> list[object]:
        fields = ("slab", "owned", "halo", "tiles", "chunk", "chunks", "span")
        return [(launch.kernel, launch.block, *map(launch.fields.get, fields)) for launch in launches]

    return (one, smaller) if cut(plan(one, smaller, backward).launches) == cut(launches) else (part, device)


def count_sectors(geometry: Geometry, backward: bool, device: Device = H100) -> dict[str, int]:
    """Distinct 32-byte sectors per warp request of one pass, by kernel."""
    batch, height, width, channels = geometry.batch, geometry.height, geometry.width, geometry.channels
    directions, dtype = len(geometry.codes), geometry.dtype
    x = aligned(batch, height, width, channels, dtype=dtype)
    logits = aligned(batch, height, width, directions, 3, geometry.groups, dtype=dtype)
    gates = [aligned(batch, height, width, directions, channels, dtype=dtype) for _ in range(2)]
    tensors = (x, logits, gates[0], gates[1], torch.ones(directions))
    host = Host()
    if backward:
        run.run_backward(x, *tensors, geometry.codes, geometry.window, device=device, launcher=host)
    else:
        run.run_forward(*tensors, geometry.codes, geometry.window, device=device, launcher=host)
    return host.sectors


def count_projected_elements(geometry: ProjectedGeometry, device: Device = H100, slabs: int = 2) -> dict[str, float]:
    """Elements per token and channel that each kernel of the fused projected scan moves, in sectors of 32 bytes.

    Only so many slabs of channels are run, on a device that is smaller in proportion, so that the batch is cut among
    blocks as it is for all of them. Raises ValueError where the fused kernels do not take the call.
    """
    todo = plan_forward(geometry, device)
    if isinstance(todo, str):
        raise ValueError(todo)
    (launch,) = todo.launches
    slab = launch.fields["slab"]
    assert isinstance(slab, int)
    channels = min(slabs * slab, geometry.channels)
    device = device.share(channels, geometry.channels)
    part = replace(geometry, channels=channels)
    host = Host()
    x, proxy, weights, merge, skip = _projected_inputs(part)
    projected.run_projected_forward(
        x, proxy, weights, merge, skip, part.codes, part.window, device=device, launcher=host
    )
    (found,) = host.launches
    assert found.grid[1:] == launch.grid[1:] and found.block == launch.block, "the part is not cut as the whole is"
    return {name: count * SECTOR_BYTES / x.nbytes for name, count in host.sectors.items()}


def count_projected_backward_elements(geometry: ProjectedGeometry, device: Device = H100) -> dict[str, float]:
    """The same of the backward pass, of one cluster's channels.

    What is moved is linear in images and in the blocks that share them: one image is run, two, and two in two blocks.
    What is written of grad_proxy counts in full for these channels, though all clusters write it once together.
    """
    todo = plan_backward(geometry, device)
    if isinstance(todo, str):
        raise ValueError(todo)
    launch = todo.launches[0]
    slab, parts = launch.fields["slab"], launch.fields["parts"]
    assert isinstance(slab, int) and isinstance(parts, int) and isinstance(launch.variant, ProjectedVariant)
    cluster, channels = launch.variant.cluster, min(slab * launch.variant.cluster, geometry.channels)
    device = replace(device, processors=cluster, clusters=1)  # holds one, so that channels are cut as in many turns

    def moved(images: int, parts: int) -> dict[str, float]:
        part = replace(geometry, batch=images, channels=channels)
        x, proxy, weights, merge, skip = _projected_inputs(part)
        host = Host()
        inputs = (x, x, proxy, weights, merge, skip, part.codes, part.window)
        projected.run_projected_backward(*inputs, device=device, launcher=host, cut=(cluster, parts))
        assert host.launches[0].block == launch.block, "the part is not cut as the whole is"
        return {name: count * SECTOR_BYTES / x[0].nbytes for name, count in host.sectors.items()}

    one, two, shared = moved(1, 1), moved(2, 1), moved(2, 2)
    return {
        name: (first + (geometry.batch - 1) * (two[name] - first) + (parts - 1) * (shared[name] - two[name]))
        / geometry.batch
        for name, first in one.items()
    }


def _projected_inputs(geometry: ProjectedGeometry) -> list[Any]:
    """Arguments of the projected scan of zeros: x, proxy, weights, merge weight, skip weight."""
    tokens, channels = (geometry.batch, geometry.height, geometry.width), geometry.channels
    dtype, directions, proxy_channels = geometry.dtype, len(geometry.codes), geometry.proxy_channels
    x = aligned(*tokens, channels, dtype=dtype)
    proxy = aligned(*tokens, proxy_channels, dtype=dtype)
    weights = [aligned(count * directions * channels, proxy_channels, dtype=dtype) for count in (3, 1, 1)]
    skip = aligned(channels, proxy_channels, dtype=dtype) if geometry.skip else None
    return [x, proxy, weights, torch.ones(directions), skip]


class Recorder:
    """Keeps launches and what their pointers point into, to replay them in a program of its own."""

    def __init__(self) -> None:
        self.launches: list[tuple[Launch, bytes]] = []
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, launch: Launch, problem: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Record one launch."""
        self.launches.append((launch, problem))
        for tensor in tensors.values():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self.storages[storage.data_ptr()] = storage

    def job(self) -> bytes:
        """The input of job.cpp."""
        parts = [struct.pack("<Q", len(self.storages))]
        for address, storage in self.storages.items():
            parts += [struct.pack("<QQ", address, storage.nbytes()), ctypes.string_at(address, storage.nbytes())]
        parts.append(struct.pack("<QQ", len(POINTERS), len(self.launches)))
        for launch, problem in self.launches:
            sizes = (*launch.grid, *launch.block)
            parts.append(launch.kernel.encode().ljust(64, b"\0"))
            parts.append(struct.pack("<6IQQ", *sizes, launch.shared_bytes, len(problem)) + problem)
        return b"".join(parts)


SANITIZERS = {
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-DHOST_CUDA_THREADS", "-pthread"],
}


def sanitized_program(variants: Sequence[Variant], sanitizer: str, sources: Path = SOURCES) -> Path:
    """job.cpp with the modules of a forward pass, a backward pass and its last sums, under a sanitizer."""
    flags = ["-O1", "-g", "-ffp-contract=off", *SANITIZERS[sanitizer]]
    objects = [
        *(
            kernel_object(variant, [*flags, f"-DLAUNCH=launch_{name}", f"-Dgspn=gspn_{name}"], sources)
            for name, variant in zip(("forward", "backward", "finish"), variants, strict=True)
        ),
        *runtime_objects(flags, "threads.cpp" if sanitizer == "thread" else "fibres.cpp"),
        compile_object(HERE / "job.cpp", flags, _texts(SOURCES)),
    ]
    return link(objects, SANITIZERS[sanitizer], "program")


def replay(program: Path, recorder: Recorder) -> subprocess.CompletedProcess[str]:
    """Run recorded launches; where they succeed, copy what they wrote back into the recorded tensors."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input", Path(folder) / "output"
        source.write_bytes(recorder.job())
        # ThreadSanitizer cannot place its shadow memory where the kernel spreads addresses too widely.
        command = ["setarch", "-R", str(program)] if shutil.which("setarch") else [str(program)]
        done = subprocess.run([*command, str(source), str(target)], capture_output=True, text=True, encoding="utf-8")
        if done.returncode == 0:
            written, first = target.read_bytes(), 0
            for address, storage in recorder.storages.items():
                ctypes.memmove(address, written[first : first + storage.nbytes()], storage.nbytes())
                first += storage.nbytes()
    return done
