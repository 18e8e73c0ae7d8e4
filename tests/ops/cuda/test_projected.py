"""The fused CUDA kernels of the projected scan: values, bytes and compiled code, all without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gspn_dit.ops.cuda.devices import ARCHITECTURES, Device
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.projected import run_projected_forward
from gspn_dit.ops.cuda.projected_plan import ProjectedGeometry, ProjectedPlan, ProjectedVariant, plan_forward
from gspn_dit.ops.inspect import parse_log
from gspn_dit.ops.materialised import projected_forward
from gspn_dit.ops.reference import scan_reference
from tests.ops.scan_cases import TOLERANCES
from tests.ops.test_projected import draw

needs_compiler = pytest.mark.skipif(
    harness.compiler() is None and not os.environ.get("CI"), reason="g++ builds the CUDA kernels for the host"
)
ALL = (0, 1, 2, 3)
IMAGENET = ProjectedGeometry(torch.bfloat16, 32, 16, 16, 1152, 1152, 72, ALL, 0)
AMPERE = ARCHITECTURES["sm_80"]


def fused(
    tensors: Sequence[Tensor],
    codes: Sequence[int] = ALL,
    window: int = 0,
    schedule: int = 0,
    host: harness.Host | None = None,
) -> Tensor:
    x, proxy, *weights = tensors
    skip = weights[4] if len(weights) == 5 else None
    host = host or harness.Host(schedule=schedule)
    y = run_projected_forward(
        x, proxy, weights[:3], weights[3], skip, codes, window, device=harness.H100, launcher=host
    )
    assert isinstance(y, Tensor), y
    assert [launch.kernel for launch in host.launches] == ["gspn_projected_forward_kernel"]
    return y


def check(tensors: list[Tensor], codes: Sequence[int] = ALL, window: int = 0, host: harness.Host | None = None) -> None:
    """Compare with the float64 reference of the same inputs, by the one table of tolerances."""
    actual = fused(tensors, codes, window, host=host)
    x, proxy, *weights = (tensor.double() for tensor in tensors)
    skip = weights[4] if len(weights) == 5 else None
    expected = projected_forward(scan_reference, x, proxy, weights[:3], weights[3], skip, list(codes), window)
    assert actual.dtype == tensors[0].dtype
    allowed = TOLERANCES[actual.dtype]
    error = (actual.double() - expected).abs()
    assert bool((error <= allowed.relative * expected.abs() + allowed.absolute * expected.abs().max()).all()), (
        error.max()
    )


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_and_partial_tiles(dtype: torch.dtype) -> None:
    """A line of 16 positions is one tile; shorter and longer lines, narrow channels and proxies are padded."""
    check(draw((2, 16, 16, 40), None, 4, 72, dtype))
    check(draw((2, 5, 7, 12), None, 4, 8, dtype), window=3)
    check(draw((1, 9, 20, 16), 2, 2, 5, dtype, skip=False), codes=(3, 0))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_set_of_directions_windows_and_groups(dtype: torch.dtype) -> None:
    for codes in ((0,), (1,), (2,), (3,), (1, 0), (2, 3), (3, 1), (2, 0, 3), (3, 1, 0, 2)):
        check(draw((1, 5, 6, 8), 4, len(codes), 4, dtype), codes, window=2)
    for window in (0, 1, 2, 3, 7):
        check(draw((1, 7, 5, 8), 1, 4, 4, dtype, skip=False), window=window)
    check(draw((1, 4, 33, 5), 1, 3, 3, dtype), codes=(2, 3, 1))
    check(draw((1, 64, 3, 8), 8, 4, 16, dtype))
    check(draw((1, 1, 1, 1), 1, 4, 1, dtype))


@needs_compiler
def test_extreme_logits_stay_finite() -> None:
    for sign in (1.0, -1.0):
        tensors = draw((1, 4, 6, 8), None, 4, 4, torch.bfloat16)
        tensors[1] = torch.ones_like(tensors[1])
        tensors[2] = tensors[2].sign() * 30 if sign > 0 else torch.full_like(tensors[2], -30.0)
        check(tensors)


@needs_compiler
def test_strides_do_not_matter() -> None:
    tensors = draw((2, 4, 5, 8), None, 4, 8, torch.bfloat16)
    buffer = torch.full((2, 5, 4, 20), float("nan"), dtype=torch.bfloat16)
    views = [buffer[..., :8].transpose(1, 2), buffer[..., 9:17].transpose(1, 2)]
    views[0].copy_(tensors[0])
    views[1].copy_(tensors[1])
    assert torch.equal(fused([*views, *tensors[2:]]), fused(tensors))


@needs_compiler
def test_bits_do_not_depend_on_which_warp_is_faster_or_on_the_batch() -> None:
    tensors = draw((3, 8, 7, 24), None, 4, 24, torch.bfloat16)
    y = fused(tensors)
    for schedule in (1, 2, 3):
        assert torch.equal(fused(tensors, schedule=schedule), y)
    assert torch.equal(fused([tensors[0][1:2], tensors[1][1:2], *tensors[2:]]), y[1:2])


@needs_compiler
def test_moves_five_elements_per_token_and_channel() -> None:
    """Counted in sectors of 32 bytes over two of 36 slabs, cut as the whole is; through memory it is 42 elements."""
    elements = sum(harness.count_projected_elements(replace(IMAGENET, skip=True)).values())
    assert 2 + 72 / 32 < elements <= 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "there are no fused kernels for float64"),
        ({"proxy_channels": 161}, "a proxy of 161 channels is wider than the 160 that registers hold"),
        ({"height": 65}, "lines of 65×16 are longer than the 64 of a warp"),
        ({"height": 64, "width": 64}, "images of 64×64 do not fit in the shared memory of a block"),
    ],
)
def test_the_plan_says_why_it_does_not_take_a_call(change: dict[str, object], reason: str) -> None:
    assert plan_forward(replace(IMAGENET, **change), harness.H100) == reason  # type: ignore[arg-type]
    assert "8.0" in str(plan_forward(IMAGENET, replace(harness.H100, tensor_cores=False)))


@pytest.mark.parametrize("device", [harness.H100, AMPERE])
def test_launches_fit_and_fill_the_device(device: Device) -> None:
    todo = plan_forward(IMAGENET, device)
    assert isinstance(todo, ProjectedPlan)
    (launch,) = todo.launches
    assert launch.shared_bytes + 1024 <= device.shared_bytes and 32 * launch.block[1] <= 512
    assert 0.7 * device.processors <= launch.grid[0] * launch.grid[1] <= device.processors
    assert launch.fields["slab"] == 32


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("proxy", "tiles"), [(72, 1), pytest.param(24, 4, marks=pytest.mark.slow)])
def test_compiles_to_tensor_core_instructions_without_spills(arch: str, proxy: int, tiles: int, tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="CuPy brings the way to NVRTC: pip install cupy-cuda13x", exc_type=ImportError)
    triton = pytest.importorskip("triton", reason="Triton brings nvdisasm: pip install triton")
    from gspn_dit.ops.cuda.sources import compile_cubin

    cubin, log = compile_cubin(ProjectedVariant("projected_forward", torch.bfloat16, 4, False, proxy, tiles), arch)
    (costs,) = parse_log(log).values()
    assert (costs.stack_bytes, costs.spill_bytes) == (0, 0)
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    sass = subprocess.run(
        [disassembler, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    products = len(re.findall(r"\bHMMA\.16(?:816|88)\.F32\.BF16\b", sass))
    # Per tile five maps, and once the skip's two, for every 16 inputs and what is left of 8.
    assert products == (5 * tiles + 2) * -(-proxy // 16)
