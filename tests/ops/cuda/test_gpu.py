"""The CUDA kernels on a GPU through CuPy: values, gradients, streams, devices, torch.compile, CUDA graphs."""

from __future__ import annotations

import math

import pytest
import torch

from gspn_dit.ops import gspn_scan, gspn_scan_from_proxy
from gspn_dit.ops.cuda import binding as cuda
from gspn_dit.ops.operator import scan_backward, scan_forward
from tests.ops.scan_cases import (
    DTYPES,
    STRIDES,
    Inputs,
    assert_close,
    check_against_reference,
    make_inputs,
    scan_and_gradients,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.problem() is not None, reason=str(cuda.problem()))]

SHAPES = (
    (2, 5, 7, 12),
    (2, 16, 16, 36),
    (1, 1, 9, 5),
    (1, 40, 23, 8),
    (3, 32, 32, 64),
    (1, 128, 96, 40),
    (1, 250, 200, 20),
)


def cuda_inputs(shape: tuple[int, int, int, int], *arguments: object, **options: object) -> Inputs:
    return make_inputs(shape, *arguments, device="cuda", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_and_large(shape: tuple[int, int, int, int], window: int | None, dtype: torch.dtype) -> None:
    check_against_reference(cuda_inputs(shape, dtype=dtype), window=window, backend="cupy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6, 9, 36])
def test_shared_weights(dtype: torch.dtype, groups: int) -> None:
    for shape in ((2, 16, 16, 36), (1, 70, 33, 36)):
        check_against_reference(cuda_inputs(shape, groups, dtype=dtype), backend="cupy")


@pytest.mark.parametrize("directions", [("left",), ("up", "right"), ("down", "right", "up")])
@pytest.mark.parametrize("strides", STRIDES)
def test_directions_and_strides(directions: tuple[str, ...], strides: str) -> None:
    inputs = cuda_inputs((2, 14, 18, 12), directions=len(directions), dtype=torch.bfloat16, strides=strides)
    check_against_reference(inputs, directions, backend="cupy")


@pytest.mark.parametrize("channels", [900, 1152, 1500])
def test_published_widths(channels: int) -> None:
    check_against_reference(cuda_inputs((2, 16, 16, channels), dtype=torch.bfloat16), backend="cupy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 11, 12), (1, 50, 40, 12), (1, 250, 200, 12)])
def test_extreme_and_unused_logits(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    inputs = cuda_inputs(shape, dtype=dtype)
    for magnitude in (120.0, 0.99 * torch.finfo(dtype).max):
        check_against_reference(inputs._replace(weight_logits=inputs.weight_logits.sign() * magnitude), backend="cupy")
    logits = inputs.weight_logits.clone()
    logits[:, :, 0, 0] = logits[:, 0, :, 2] = logits[:, 0, :, :2, 0] = logits[:, :, 0, 2:, 0] = math.nan
    y, gradients = scan_and_gradients(inputs._replace(weight_logits=logits), torch.ones_like(inputs.x), backend="cupy")
    assert bool(y.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool((gradients[1][logits.isnan()] == 0).all())


def test_gradcheck() -> None:
    inputs = cuda_inputs((1, 3, 4, 2), dtype=torch.float64, merge=torch.float64).leaves()
    assert torch.autograd.gradcheck(lambda *a: gspn_scan(*a, window=2, backend="cupy"), inputs.tensors())


def test_opcheck() -> None:
    inputs = cuda_inputs((2, 5, 6, 8)).leaves()
    arguments = (*inputs, [0, 1, 2, 3], 0)
    torch.library.opcheck(scan_forward, arguments)
    torch.library.opcheck(
        scan_backward, (torch.ones_like(inputs.x), *(t.detach() for t in inputs.tensors()), [0, 2, 1, 3], 2)
    )


def test_results_repeat_bit_by_bit() -> None:
    inputs = cuda_inputs((4, 16, 16, 96), 2, dtype=torch.bfloat16)
    grad_y = torch.randn_like(inputs.x)
    first, second = (scan_and_gradients(inputs, grad_y, backend="cupy") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("groups", [1152, 9])
def test_projected_scan_of_a_published_width_repeats_bit_by_bit(groups: int) -> None:
    """The fused kernels, in clusters where there are some, against the float64 reference, and against themselves."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(2, 16, 16, 1152), (2, 16, 16, 72), (12 * groups, 72), (4 * 1152, 72), (4 * 1152, 72), (4,), (1152, 72)]
    tensors = [torch.randn(size, generator=generator, device="cuda").bfloat16() for size in sizes]
    grad_y = torch.randn(sizes[0], generator=generator, device="cuda").bfloat16()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    y = gspn_scan_from_proxy(*leaves, backend="cupy")
    first, second = (torch.autograd.grad(y, leaves, grad_y, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = gspn_scan_from_proxy(*wide, backend="reference")
    assert_close(y, exact, "y", size=0.0)
    for index, (one, other) in enumerate(zip(first, torch.autograd.grad(exact, wide, grad_y.double()), strict=True)):
        assert_close(one, other, f"gradient {index}", size=0.0)


@pytest.mark.parametrize("shape", [(2, 16, 16, 64), (1, 100, 60, 16), (1, 250, 200, 16)])
def test_compiles_in_one_graph(shape: tuple[int, int, int, int]) -> None:
    inputs = cuda_inputs(shape).leaves()

    @torch.compile(fullgraph=True)
    def run(*arguments: torch.Tensor) -> torch.Tensor:
        return gspn_scan(*arguments) * 2

    y = run(*inputs)
    torch.testing.assert_close(y, gspn_scan(*inputs, backend="reference") * 2)
    actual = torch.autograd.grad(y.square().sum(), inputs.tensors())
    expected = torch.autograd.grad((2 * gspn_scan(*inputs, backend="reference")).square().sum(), inputs.tensors())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 16, 64), (1, 100, 60, 16), (1, 250, 200, 16)])
def test_replays_from_a_cuda_graph(shape: tuple[int, int, int, int]) -> None:
    inputs, other = cuda_inputs(shape), cuda_inputs(shape, seed=1)
    grad_y = torch.ones_like(inputs.x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        scan_and_gradients(inputs, grad_y, backend="cupy")  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, gradients = scan_and_gradients(inputs, grad_y, backend="cupy")
    for target, source in zip(inputs.tensors(), other.tensors(), strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    expected_y, expected = scan_and_gradients(other, grad_y, backend="cupy")
    assert torch.equal(y, expected_y)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_runs_on_the_current_stream() -> None:
    """Work queued before the scan on a side stream is seen by it, without any synchronisation in between."""
    inputs = cuda_inputs((8, 16, 16, 512))
    expected = gspn_scan(*inputs, backend="cupy")
    stream = torch.cuda.Stream()
    x = torch.full_like(inputs.x, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(inputs.x)
        y = gspn_scan(x, *inputs[1:], backend="cupy")
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device() -> None:
    inputs = make_inputs((2, 16, 16, 64), device="cuda:1")
    assert torch.cuda.current_device() == 0
    y, gradients = scan_and_gradients(inputs, torch.ones_like(inputs.x), backend="cupy")
    first = Inputs(*(None if t is None else t.to("cuda:0") for t in inputs))
    expected_y, expected = scan_and_gradients(first, torch.ones_like(first.x), backend="cupy")
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.to("cuda:0"), expected_y)
    assert all(torch.equal(a.to("cuda:0"), b) for a, b in zip(gradients, expected, strict=True))


def test_offsets_beyond_32_bits() -> None:
    """Logits of more than 2³¹ elements; the first and the last images are those of small scans."""
    shape = (24, 64, 64, 2048)  # 24·4096·4·3·2048 = 2.4e9 logits
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    pixels = (*shape[:3], 4)
    logits = torch.empty(*pixels, 3, 2048, dtype=torch.bfloat16, device="cuda").normal_()
    gates = [torch.empty(*pixels, 2048, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2)]
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    y = gspn_scan(x, logits, *gates, backend="cupy")
    for image in (slice(0, 1), slice(23, 24)):
        part = gspn_scan(x[image], logits[image], gates[0][image], gates[1][image], backend="cupy")
        assert torch.equal(y[image], part)
