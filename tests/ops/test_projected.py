"""The scan behind its linear maps: the same values and gradients as `gspn_scan` over the projections, fewer bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gspn_dit.ops import DIRECTIONS, gspn_scan, gspn_scan_from_proxy

SIZES_OF_A_LARGE_PROJECTION = ((1, 32, 32, 1024), (1, 32, 32, 4), (12288, 4), (4096, 4), (4096, 4), (4,))
NAMES = ("x", "proxy", "logits_weight", "input_gate_weight", "output_gate_weight", "merge_weight", "skip_weight")


def draw(
    shape: tuple[int, int, int, int] = (2, 3, 4, 6),
    groups: int | None = None,
    directions: int = 4,
    proxy_channels: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    skip: bool = True,
) -> list[Tensor]:
    """The tensor arguments in the order of `NAMES`, the skip weight only if asked for."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[3]
    shapes: list[tuple[int, ...]] = [
        shape,
        (*shape[:3], proxy_channels),
        (directions * 3 * (groups or channels), proxy_channels),
        (directions * channels, proxy_channels),
        (directions * channels, proxy_channels),
        (directions,),
        *([(channels, proxy_channels)] if skip else []),
    ]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in shapes]


def plain(x: Tensor, proxy: Tensor, *weights: Tensor, directions: Sequence[str] = DIRECTIONS, **options: Any) -> Tensor:
    """What the function must equal: three linear maps, the scan, and the skip."""
    count, channels = len(directions), x.shape[-1]
    weight_logits, input_gate, output_gate = (F.linear(proxy, weight) for weight in weights[:3])
    y = gspn_scan(
        x,
        weight_logits.unflatten(-1, (count, 3, -1)),
        input_gate.unflatten(-1, (count, channels)),
        output_gate.unflatten(-1, (count, channels)),
        weights[3],
        directions=directions,
        **options,
    )
    return y + F.linear(proxy, weights[4]) * x if len(weights) == 5 else y


def with_gradients(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The output, then the gradient of each tensor, for an upstream gradient of cosines."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves, **options)
    grad_y = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for name, one, other in zip(("y", *NAMES), actual, expected):
        assert one.dtype == other.dtype, name
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_equals_the_scan_over_the_projections(backend: str, groups: int | None, window: int | None) -> None:
    tensors = draw(groups=groups, skip=groups != 3)
    actual = with_gradients(gspn_scan_from_proxy, tensors, window=window, backend=backend)
    assert_same(actual, with_gradients(plain, tensors, window=window, backend="reference"), 1e-12)


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 6, 16])),
    grouping=st.sampled_from([1, 2]),
    proxy_channels=st.integers(1, 4),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, unique=True),
    window=st.none() | st.integers(1, 6),
    skip=st.booleans(),
    name=st.sampled_from(["cpu", "reference"]),
)
def test_equals_the_scan_over_the_projections_in_all_shapes(
    shape: tuple[int, int, int, int],
    grouping: int,
    proxy_channels: int,
    directions: list[str],
    window: int | None,
    skip: bool,
    name: str,
) -> None:
    groups = shape[3] // grouping or 1
    tensors = draw(shape, groups, len(directions), proxy_channels, skip=skip)
    options: dict[str, Any] = {"directions": directions, "window": window}
    actual = with_gradients(gspn_scan_from_proxy, tensors, **options, backend=name)
    assert_same(actual, with_gradients(plain, tensors, **options, backend="reference"), 1e-11)


def test_gradcheck(backend: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in draw((1, 2, 3, 2), proxy_channels=2)]
    assert torch.autograd.gradcheck(lambda *args: gspn_scan_from_proxy(*args, window=2, backend=backend), tensors)


def test_without_gradients_the_values_are_the_same(backend: str) -> None:
    tensors = draw()
    expected = plain(*tensors, backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(gspn_scan_from_proxy(*tensors, backend=backend), expected, rtol=1e-12, atol=1e-12)
    y = gspn_scan_from_proxy(*tensors, backend=backend)  # gradients are on, but nothing asks for one
    assert not y.requires_grad
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [*NAMES, "every weight", "x and proxy"])
def test_only_some_inputs_need_a_gradient(backend: str, wanted: str) -> None:
    """Frozen weights, or inputs from data: what needs no gradient gets none, and the others do not change."""
    chosen = {"every weight": NAMES[2:], "x and proxy": NAMES[:2]}.get(wanted, (wanted,))
    tensors = draw()
    expected = dict(zip(NAMES, with_gradients(plain, tensors, backend="reference")[1:], strict=True))
    leaves = {name: t.clone().requires_grad_(name in chosen) for name, t in zip(NAMES, tensors, strict=True)}
    y = gspn_scan_from_proxy(*leaves.values(), backend=backend)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape))
    for name, leaf in leaves.items():
        if name in chosen:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-11)
        else:
            assert leaf.grad is None, name


def test_gradients_accumulate_over_two_uses(backend: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in draw()]
    once = torch.autograd.grad(gspn_scan_from_proxy(*leaves, backend=backend).square().sum(), leaves)
    first, second = (gspn_scan_from_proxy(*leaves, backend=backend) for _ in range(2))
    twice = torch.autograd.grad(first.square().sum() + second.square().sum(), leaves)
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone(backend: str) -> None:
    tensors = draw()
    copies = [tensor.clone() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    gspn_scan_from_proxy(*leaves, backend=backend).sum().backward()
    assert all(torch.equal(leaf.detach(), copy) for leaf, copy in zip(leaves, copies, strict=True))


def test_strides_do_not_matter(backend: str) -> None:
    tensors = draw()
    strided = [tensor.permute(*reversed(range(tensor.dim()))).contiguous() for tensor in tensors]
    strided = [tensor.permute(*reversed(range(tensor.dim()))) for tensor in strided]
    assert not strided[0].is_contiguous()
    expected = with_gradients(plain, tensors, backend="reference")
    leaves = [tensor.requires_grad_() for tensor in strided]
    y = gspn_scan_from_proxy(*leaves, backend=backend)
    gradients = torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel()).double()).reshape(y.shape))
    assert_same([y.detach(), *gradients], expected, 1e-12)


@pytest.mark.parametrize("merge_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_inputs(backend: str, merge_dtype: torch.dtype) -> None:
    tensors = draw((2, 4, 4, 8), dtype=torch.bfloat16)
    tensors[5] = tensors[5].to(merge_dtype)
    actual = with_gradients(gspn_scan_from_proxy, tensors, backend=backend)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16] * 6 + [merge_dtype, torch.bfloat16]
    expected = with_gradients(plain, [tensor.double() for tensor in tensors], backend="reference")
    for name, one, other in zip(("y", *NAMES), actual, expected, strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm(), name


def test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_inputs(backend: str) -> None:
    tensors = draw((2, 4, 4, 8), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(gspn_scan_from_proxy, tensors, backend=backend)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16] + [torch.float32] * 7
    cast = [tensor.to(torch.bfloat16) if name != "merge_weight" else tensor for name, tensor in zip(NAMES, tensors)]
    by_hand = with_gradients(gspn_scan_from_proxy, cast, backend=backend)
    for name, one, other in zip(("y", *NAMES), actual, by_hand, strict=True):
        assert torch.equal(one.to(other.dtype), other), name


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_autocast_around_one_half_alone(backend: str, inside: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in draw(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "forward"):
        y = gspn_scan_from_proxy(*leaves, backend=backend)
    assert y.dtype == (torch.bfloat16 if inside == "forward" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "backward"):
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = torch.autograd.grad(plain(*wide, backend="reference").square().sum(), wide)
    # Autograd's own derivative of a linear map, behind the reference, is cast wherever it runs.
    tolerance = 1e-5 if inside == "backward" and backend == "cpu" else 0.05
    for name, one, other in zip(NAMES, gradients, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() < tolerance * other.norm(), name


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be None or an int of at least 1, got 0"),
        ({"window": -1}, "window must be None or an int of at least 1, got -1"),
        ({"directions": ()}, "directions is empty"),
        ({"directions": ("right", "left", "down", "right")}, "a direction is given twice"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"x": torch.zeros(3, 4, 6)}, r"x must be \[B, H, W, C\], got shape \[3, 4, 6\]"),
        ({"x": torch.zeros(2, 3, 4, 6, dtype=torch.long)}, r"x has dtype torch.int64"),
        ({"x": torch.zeros(2, 3, 4, 6, dtype=torch.float32)}, "input_gate|weight_logits has dtype torch.float64, but"),
        ({"proxy": torch.zeros(2, 2, 4, 3)}, r"input_gate has shape \[2, 2, 4, 4, 6\], but x \[2, 3, 4, 6\]"),
        ({"logits_weight": torch.zeros(48, 3)}, "weight_logits has 4 groups, which must divide the 6 channels"),
        ({"merge_weight": torch.zeros(3)}, r"merge_weight has shape \[3\], but 4 directions ask for \[4\]"),
        ({"proxy": torch.zeros(3, 4, 3)}, r"proxy must be \[B, H, W, P\], got shape \[3, 4, 3\]"),
        (
            {"input_gate_weight": torch.zeros(24, 2)},
            r"input_gate_weight has shape \[24, 2\], but a proxy of 3 asks for",
        ),
        ({"output_gate_weight": torch.zeros(23, 3)}, "output_gate_weight has 23 rows, .* multiple of 4"),
        ({"logits_weight": torch.zeros(70, 3)}, "logits_weight has 70 rows, .* multiple of 12"),
        ({"skip_weight": torch.zeros(5, 3)}, r"skip_weight has 5 rows, but x \[2, 3, 4, 6\] asks for one per channel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_breaks_the_contract_is_refused_in_training_too(grad: bool, change: dict[str, Any], message: str) -> None:
    """The kernels trust shapes and dtypes, so a mistake must not get through to them."""
    arguments: dict[str, Any] = dict(zip(NAMES, draw(), strict=True))
    for name, value in change.items():
        keep = not isinstance(value, Tensor) or (name == "x" and value.dim() == 4)
        arguments[name] = value if keep else value.double()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        gspn_scan_from_proxy(**arguments)


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors_of_any_size_stay_fake(grad: bool) -> None:
    """`train.py --dry-run` measures models without memory."""
    with FakeTensorMode():
        tensors = [torch.empty(size, requires_grad=grad) for size in SIZES_OF_A_LARGE_PROJECTION]
        with torch.set_grad_enabled(grad):
            y = gspn_scan_from_proxy(*tensors)
        if grad:
            y.sum().backward()
    assert isinstance(y, FakeTensor) and y.shape == tensors[0].shape


def test_double_derivative_says_that_the_reference_has_it() -> None:
    leaves = [tensor.requires_grad_() for tensor in draw()]
    (grad_x,) = torch.autograd.grad(
        gspn_scan_from_proxy(*leaves, backend="cpu").square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad_x.sum().backward()


@pytest.mark.slow
def test_double_derivative_through_the_reference() -> None:
    tensors = [tensor.requires_grad_() for tensor in draw((1, 2, 2, 2), proxy_channels=1)]
    assert torch.autograd.gradgradcheck(lambda *args: gspn_scan_from_proxy(*args, backend="reference"), tensors)
