"""The fused CUDA kernels of the projected scan's gradients: values, bytes and compiled code, all without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gspn_dit.ops.cpu import projected as cpu
from gspn_dit.ops.cuda import sass
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.projected import run_projected_backward
from gspn_dit.ops.cuda.projected_backward_plan import plan_backward
from gspn_dit.ops.cuda.projected_plan import ProjectedPlan, ProjectedVariant
from gspn_dit.ops.inspect import main, parse_log
from gspn_dit.ops.materialised import projected_forward
from gspn_dit.ops.reference import scan_reference
from tests.ops.cuda.test_projected import AMPERE, IMAGENET
from tests.ops.scan_cases import TOLERANCES, assert_close
from tests.ops.test_projected import NAMES, draw

needs_compiler = pytest.mark.skipif(
    harness.compiler() is None and not os.environ.get("CI"), reason="g++ builds the CUDA kernels for the host"
)
ALL = (0, 1, 2, 3)


def split(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor], Tensor, Tensor | None]:
    x, proxy, *weights = tensors
    return x, proxy, weights[:3], weights[3], weights[4] if len(weights) == 5 else None


def upstream(x: Tensor) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape).to(x.dtype)


def fused(
    tensors: Sequence[Tensor],
    codes: Sequence[int] = ALL,
    window: int = 0,
    host: harness.Host | None = None,
    cut: tuple[int, int] | None = None,
    grad_y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    host = host or harness.Host()
    grad_y = upstream(tensors[0]) if grad_y is None else grad_y
    gradients = run_projected_backward(
        grad_y, *split(tensors), codes, window, device=harness.H100, launcher=host, cut=cut
    )
    assert not isinstance(gradients, str), gradients
    assert {launch.kernel for launch in host.launches} == {
        f"gspn_projected_{name}_kernel" for name in ("backward", "join")
    }
    return gradients


def expected(tensors: Sequence[Tensor], codes: Sequence[int] = ALL, window: int = 0) -> tuple[Tensor, ...]:
    """Of the float64 reference of the same inputs."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    y = projected_forward(scan_reference, *split(leaves), list(codes), window)
    return torch.autograd.grad(y, leaves, upstream(tensors[0]).double())


def check(
    tensors: Sequence[Tensor],
    codes: Sequence[int] = ALL,
    window: int = 0,
    host: harness.Host | None = None,
    cut: tuple[int, int] | None = None,
) -> None:
    """Compare every gradient with the reference's by the one table of tolerances."""
    found = fused(tensors, codes, window, host, cut)
    for name, tensor, one, other in zip(NAMES, tensors, found, expected(tensors, codes, window)):
        assert one.dtype == tensor.dtype, name
        assert_close(one, other, name, size=0.0)
    assert len(tensors) == len(NAMES) or found[-1].shape == (0,)


@needs_compiler
def test_gradients_in_a_cluster_with_windows_groups_and_the_skip() -> None:
    """Two blocks of eight channels each join their gradients of the proxies; lines are shorter than a tile."""
    tensors = draw((2, 5, 7, 12), 6, 4, 8, torch.bfloat16)
    check(tensors, window=3, cut=(2, 2))
    first, again = (fused(tensors, host=harness.Host(schedule=seed), cut=(2, 2)) for seed in (0, 7))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_and_partial_tiles(dtype: torch.dtype) -> None:
    """Lines of 16 positions, an odd number of lines, proxies of 24 and 20 channels, a slab that is not full."""
    check(draw((3, 16, 16, 20), None, 4, 24, dtype), cut=(1, 2))
    check(draw((1, 16, 15, 8), 1, 4, 20, dtype, skip=False), window=4)


@needs_compiler
@pytest.mark.slow
def test_every_set_of_directions_windows_and_groups() -> None:
    for codes in ((0,), (1,), (2,), (3,), (1, 0), (2, 3), (3, 1), (2, 0, 3), (3, 1, 0, 2)):
        check(draw((1, 5, 6, 8), 4, len(codes), 4, torch.bfloat16), codes, window=2, cut=(1, 1))
    for window in (0, 1, 2, 3, 7):
        check(draw((1, 7, 5, 8), 1, 4, 4, torch.bfloat16, skip=False), window=window, cut=(1, 1))
    check(draw((1, 3, 40, 5), 1, 1, 3, torch.bfloat16), codes=(0,), cut=(1, 1))
    check(draw((1, 1, 1, 1), 1, 4, 1, torch.bfloat16), cut=(1, 1))


@needs_compiler
@pytest.mark.slow
def test_the_text_without_tensor_cores() -> None:
    check(draw((1, 4, 5, 8), 2, 4, 3, torch.float32), window=3, cut=(1, 1))
    check(draw((2, 3, 4, 12), None, 2, 3, torch.float32, skip=False), codes=(1, 2), cut=(2, 2))


@needs_compiler
@pytest.mark.slow
def test_close_to_the_operator_of_the_cpu() -> None:
    tensors = draw((2, 6, 9, 24), 3, 4, 8, torch.bfloat16)
    others = cpu.scan_backward(upstream(tensors[0]), *split(tensors), ALL, 4)
    for name, one, other in zip(NAMES, fused(tensors, window=4, cut=(1, 1)), others, strict=True):
        allowed = TOLERANCES[one.dtype]
        error, most = (one.double() - other.double()).abs(), float(other.abs().max())
        assert bool((error <= 2 * allowed.relative * other.abs() + 2 * allowed.absolute * most).all()), name


@needs_compiler
@pytest.mark.slow
def test_extreme_logits_stay_finite() -> None:
    for sign in (1.0, -1.0):
        tensors = draw((1, 4, 6, 8), None, 4, 4, torch.bfloat16)
        tensors[1] = torch.full_like(tensors[1], 8.0)
        tensors[2] = tensors[2].sign() * 4 if sign > 0 else torch.full_like(tensors[2], -4.0)
        assert all(bool(gradient.isfinite().all()) for gradient in fused(tensors, cut=(1, 1)))
        check(tensors, cut=(1, 1))


@needs_compiler
@pytest.mark.slow
def test_strides_do_not_matter() -> None:
    tensors = draw((2, 4, 5, 8), None, 4, 8, torch.bfloat16)
    buffer = torch.full((2, 5, 4, 29), float("nan"), dtype=torch.bfloat16)
    views = [buffer[..., first : first + 8].transpose(1, 2) for first in (0, 9, 18)]
    for view, tensor in zip(views, (*tensors[:2], upstream(tensors[0]))):
        view.copy_(tensor)
    found = fused([*views[:2], *tensors[2:]], cut=(1, 1), grad_y=views[2])
    assert all(torch.equal(a, b) for a, b in zip(found, fused(tensors, cut=(1, 1)), strict=True))


@needs_compiler
@pytest.mark.slow
def test_moves_fifteen_elements_per_token_and_channel() -> None:
    """Counted in sectors of 32 bytes; through memory it is 103 elements."""
    elements = sum(harness.count_projected_backward_elements(replace(IMAGENET, skip=True)).values())
    assert 3 + 72 / 16 < elements <= 15


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "there are no fused kernels for float64"),
        ({"proxy_channels": 81}, "a proxy of 81 channels is wider than the 80 that registers hold"),
        ({"height": 17}, "lines of 17×16 are longer than the 16 of a warp"),
        ({"height": 200, "codes": (2,)}, "images of 200×16 do not fit in the shared memory of a block"),
    ],
)
def test_the_plan_says_why_it_does_not_take_a_call(change: dict[str, object], reason: str) -> None:
    assert plan_backward(replace(IMAGENET, **change), harness.H100) == reason  # type: ignore[arg-type]
    assert "8.0" in str(plan_backward(IMAGENET, replace(harness.H100, tensor_cores=False)))


def test_launches_fit_the_device() -> None:
    todo = plan_backward(replace(IMAGENET, skip=True), harness.H100)
    assert isinstance(todo, ProjectedPlan)
    first, *joins = todo.launches
    assert first.shared_bytes + 1024 <= harness.H100.shared_bytes and first.block == (32, 8, 1)
    assert first.fields["slab"] == 16 and first.grid[0] == 72
    assert [launch.fields["job"] for launch in joins] == [0, 1, 2, 3, 4, 5]
    spans, parts = first.fields["spans"], first.grid[1]
    assert isinstance(spans, int)
    assert todo.buffers["proxy_sums"] == spans * IMAGENET.tokens * 72
    assert todo.buffers["weight_sums"] == parts * 20 * 1152 * 72


def test_without_clusters_narrow_slabs_are_taken() -> None:
    """An A100 has 163 KB for a block, in which eight channels fit."""
    todo = plan_backward(IMAGENET, AMPERE)
    assert isinstance(todo, ProjectedPlan)
    variant = todo.launches[0].variant
    assert isinstance(variant, ProjectedVariant) and variant.cluster == 1
    assert todo.launches[0].fields["slab"] == 8


@needs_compiler
@pytest.mark.slow
def test_the_inspector_shows_the_fused_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cupy", reason="CuPy brings the way to NVRTC: pip install cupy-cuda13x", exc_type=ImportError)
    main(["--shape", "2,5,7,12,12", "--proxy-channels", "8", "--dtype", "bfloat16", "--json"])
    reports = json.loads(capsys.readouterr().out)
    assert [report["kernel"].split("_")[2] for report in reports] == ["forward", "backward", "join"]
    assert [report["regime"] for report in reports] == [f"projected_{name}" for name in ("forward", "backward", "join")]
    for report in reports:
        assert (report["stack_bytes"], report["spill_bytes"], report["reason"]) == (0, 0, None)
        assert report["bytes_ratio"] >= 1 and report["predicted_ms"] == report["bytes_ms"] > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--proxy-channels", "0"], "--proxy-channels is 0, but must be a positive number"),
        (["--proxy-channels", "8", "--dtype", "float32"], "float32 runs through memory, not by fused kernels"),
        (["--proxy-channels", "161", "--dtype", "float16"], "the forward pass runs through memory: a proxy of 161"),
    ],
)
def test_the_inspector_says_in_one_line_what_it_cannot_show(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and why in error and error.count("\n") == 1


@pytest.mark.parametrize(("arch", "cluster"), [("sm_90", 8), pytest.param("sm_80", 1, marks=pytest.mark.slow)])
def test_compiles_to_tensor_core_instructions_without_spills(arch: str, cluster: int, tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="CuPy brings the way to NVRTC: pip install cupy-cuda13x", exc_type=ImportError)
    from gspn_dit.ops.cuda.sources import compile_cubin

    variant = IMAGENET.variant("projected_backward", cluster)
    cubin, log = compile_cubin(variant, arch)
    (costs,) = parse_log(log).values()
    assert (costs.stack_bytes, costs.spill_bytes) == (0, 0)
    if sass.disassembler() is None:
        pytest.skip("nvdisasm reads machine code: pip install triton")
    (code,) = sass.read_code(cubin, variant).values()
    assert code.bytes <= 96 * 1024
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    text = subprocess.run(
        [str(sass.disassembler()), "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", text, re.MULTILINE)
    # Values there and back (9 maps) and of the skip, for four sixteens of inputs and a half; gradients of weights and
    # proxies in two parts, of five maps and of the skip's: 20 + 3 and 9·3 of each line, 4 + 1 and 9 of the skip.
    assert opcodes.count("HMMA") == (9 + 1) * 5 + 2 * (23 + 27) + 2 * (5 + 9)
    # Only what comes from other blocks of the cluster is addressed generically.
    assert (opcodes.count("LD"), opcodes.count("ST")) == (cluster if cluster > 1 else 0, 0)
    assert "LDL" not in opcodes and "STL" not in opcodes
