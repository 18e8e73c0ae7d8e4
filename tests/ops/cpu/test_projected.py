"""The fused kernels of the projected scan, on every instruction set: close to the formulas, same bits however cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.ops import DIRECTIONS, gspn_scan_from_proxy
from gspn_dit.ops.cpu import binding, projected
from tests.ops.scan_cases import DTYPES, assert_close
from tests.ops.test_projected import NAMES, draw, plain, with_gradients

FUSED = [name for name in binding.available_kernels() if name in projected.FUSED_KERNELS]
NEEDS_AMX = pytest.mark.skipif("amx" not in FUSED, reason="no matrix instructions here")


@pytest.fixture(
    params=[*(pytest.param(name, marks=pytest.mark.slow) for name in FUSED[:-1]), *FUSED[-1:]], autouse=True
)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each of the kernels that this machine has."""
    monkeypatch.setenv(binding.KERNELS_VARIABLE, request.param)
    return str(request.param)


def inputs(
    shape: tuple[int, int, int, int], *others: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Random tensors with logits and gates of size one, and a merge weight in the accumulation dtype."""
    tensors = draw(shape, *others, **options)
    for weight in (*tensors[2:5], *tensors[6:]):
        weight /= tensors[1].shape[-1] ** 0.5
    merge = torch.float64 if dtype == torch.float64 else torch.float32
    return [tensor.to(merge if name == "merge_weight" else dtype) for name, tensor in zip(NAMES, tensors)]


def check(tensors: list[Tensor], **options: Any) -> None:
    """Compare y and all gradients with those of the reference in float64."""
    assert projected.fused(*tensors[:2])
    actual = with_gradients(gspn_scan_from_proxy, tensors, backend="cpu", **options)
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = plain(*leaves, backend="reference", **options)
    # The upstream gradient of `with_gradients`, rounded as that of the kernels was.
    grad_y = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(tensors[0].dtype).double()
    expected = [y, *torch.autograd.grad(y, leaves, grad_y)]
    for name, one, other in zip(("y", *NAMES), actual, expected):
        assert_close(one, other, name)


CASES = [
    # shape, groups, proxy channels, directions, window
    ((1, 1, 1, 1), None, 1, DIRECTIONS, None),
    ((2, 1, 9, 33), None, 3, DIRECTIONS, None),
    ((1, 9, 1, 31), None, 4, DIRECTIONS, 4),
    ((3, 5, 7, 16), None, 13, ("up", "left"), None),
    ((1, 7, 5, 52), None, 5, ("left",), 2),
    ((2, 6, 8, 130), None, 24, ("down", "right", "up"), 3),
    ((1, 70, 3, 20), None, 12, DIRECTIONS, None),
    ((1, 3, 67, 20), None, 16, ("right", "down"), 64),
    ((2, 6, 5, 48), 3, 7, DIRECTIONS, None),
    ((1, 4, 6, 34), 2, 2, DIRECTIONS, 2),
    ((2, 3, 4, 24), 12, 9, ("right", "up"), None),
    ((1, 3, 2, 144), 1, 8, DIRECTIONS, 1),
    # groups of whole vectors: of 2 and more, some of them cut by the shares of the backward
    ((2, 6, 5, 96), 3, 7, DIRECTIONS, None),
    ((1, 9, 20, 160), 2, 13, ("up", "right", "left"), 4),
    ((2, 1, 19, 192), 6, 20, ("left", "down"), None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, (*case[0], case[2]))))
def test_odd_shapes(case: tuple, dtype: torch.dtype) -> None:
    shape, groups, proxy_channels, directions, window = case
    skip = sum(shape) % 2 == 0
    tensors = inputs(shape, groups, len(directions), proxy_channels, dtype=dtype, skip=skip, seed=shape[1])
    check(tensors, directions=directions, window=window)


@pytest.mark.parametrize(
    "values", [(-120.0,), (120.0,), (-120.0, 120.0), (-2e38, 2e38), (-17.0, -40.0, 20.0), (-1000.0, -1001.0)]
)
@pytest.mark.parametrize(("channels", "groups"), [(20, None), (64, 2)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_extreme_logits(values: Sequence[float], dtype: torch.dtype, channels: int, groups: int | None) -> None:
    """A proxy of which each token has one channel makes logits of the weights' values."""
    tensors = inputs((1, 6, 5, channels), groups, proxy_channels=30, dtype=dtype)
    tensors[1] = torch.eye(30, dtype=dtype).view(1, 6, 5, 30)
    chosen = torch.randint(len(values), tensors[2].shape, generator=torch.Generator().manual_seed(1))
    tensors[2] = torch.tensor(values, dtype=torch.float64)[chosen].to(dtype)
    actual = with_gradients(gspn_scan_from_proxy, tensors, backend="cpu")
    expected = with_gradients(plain, [tensor.double() for tensor in tensors], backend="reference")
    for name, one, other in zip(("y", *NAMES), actual, expected):
        assert one.isfinite().all(), name
        size = max(1.0, float(other.abs().max()))
        if name == "proxy":  # a sum of products with weights as large as the logits
            size *= max(abs(value) for value in values)
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_equal_differences_below_zero_give_equal_weights() -> None:
    """Far below zero a weight depends on differences of logits alone; where they begin to be shifted nothing jumps."""
    tensors = inputs((1, 5, 6, 24), proxy_channels=4, skip=False)
    tensors[1][..., 0] = 1
    weight = tensors[2].clamp(-1, 1)
    for shift in (14.0, 16.0, 17.0, 20.0, 40.0, 100.0):
        tensors[2] = weight.clone()
        tensors[2][:, 0] -= shift
        y = gspn_scan_from_proxy(*tensors, backend="cpu").double()
        wide = [tensor.double() for tensor in tensors]
        torch.testing.assert_close(y, plain(*wide, backend="reference"), rtol=1e-4, atol=1e-4)


SHAPES = [((3, 9, 7, 72), None), ((2, 5, 6, 160), 4), ((5, 3, 20, 33), None), ((3, 5, 6, 192), 4)]
LARGE = ((3, 2, 3, 1104), None)  # its panels are read for all samples in turn


def results(tensors: list[Tensor], samples: slice = slice(None)) -> list[Tensor]:
    """y and all gradients for some samples; upstream gradients belong to their sample."""
    chosen = [tensor[samples] if index < 2 else tensor for index, tensor in enumerate(tensors)]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in chosen]
    y = gspn_scan_from_proxy(*leaves, backend="cpu")
    grad_y = torch.cos(torch.arange(tensors[0].numel())).reshape(tensors[0].shape).to(y.dtype)[samples]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


@pytest.mark.parametrize(("shape", "groups"), [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_bits_do_not_depend_on_threads_blocks_or_batch(
    shape: tuple[int, int, int, int], groups: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(shape, groups, proxy_channels=10, dtype=dtype)
    expected = results(tensors)
    threads = torch.get_num_threads()
    try:
        for count, block in ((1, 1), (2, 3), (3, 0)):
            torch.set_num_threads(count)
            monkeypatch.setattr(projected, "BLOCK", block)
            for name, one, other in zip(("y", *NAMES), results(tensors), expected):
                assert torch.equal(one, other), (name, count, block)
        for samples in (slice(0, 1), slice(1, None)):
            for name, one, other in zip(("y", "x", "proxy"), results(tensors, samples), expected):
                assert torch.equal(one, other[samples]), (name, samples)
    finally:
        torch.set_num_threads(threads)


def with_kernels(name: str, tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setenv(binding.KERNELS_VARIABLE, name)
    return results(tensors)


@NEEDS_AMX
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix_instructions_are_for_bfloat16_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 32 proxy channels add up in another order than one after the other."""
    tensors = inputs((1, 5, 18, 40), proxy_channels=48, dtype=dtype)
    one, other = (with_kernels(name, tensors, monkeypatch) for name in ("avx512", "amx"))
    same = all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert same == (dtype != torch.bfloat16)


@NEEDS_AMX
def test_matrix_instructions_share_the_tiles_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles have a shape, which torch's own products of bfloat16 rely on as the scan's do."""
    tensors = inputs((2, 6, 7, 40), proxy_channels=10, dtype=torch.bfloat16)
    matrix = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, product = with_kernels("amx", tensors, monkeypatch)[0], matrix.float() @ matrix.float().T
    for _ in range(3):
        torch.testing.assert_close((matrix @ matrix.T).float(), product, rtol=2**-7, atol=2**-7)
        assert torch.equal(with_kernels("amx", tensors, monkeypatch)[0], y)


def test_a_sum_over_many_tokens_stays_accurate() -> None:
    """Weights' gradients are sums over all tokens; one chain in float32 would lose digits."""
    tensors = inputs((2, 96, 96, 16), proxy_channels=2, directions=1)
    tensors[1] = tensors[1].abs() + 1
    actual = with_gradients(gspn_scan_from_proxy, tensors, directions=["down"], backend="cpu")
    expected = with_gradients(
        gspn_scan_from_proxy, [tensor.double() for tensor in tensors], directions=["down"], backend="cpu"
    )
    for name, one, other in zip(NAMES[2:], actual[3:], expected[3:]):
        assert (one.double() - other).norm() < 1.5e-6 * other.norm(), name


@pytest.mark.parametrize(("channels", "groups"), [(20, None), (64, 2)])
def test_nan_reaches_what_it_must_and_no_other_sample(channels: int, groups: int | None) -> None:
    for index, name in enumerate(NAMES):
        tensors = inputs((2, 4, 5, channels), groups, skip=True)
        tensors[index].view(-1)[0] = math.nan
        y = gspn_scan_from_proxy(*tensors, backend="cpu")
        truth = plain(*tensors, backend="reference")
        assert torch.equal(y.isnan(), truth.isnan()), name
