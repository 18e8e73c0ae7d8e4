"""Derivatives in forward mode: against the reference's own, against differences, whatever asks for them and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from gspn_dit.ops import DIRECTIONS, gspn_scan, gspn_scan_from_proxy
from tests.ops.scan_cases import make_inputs
from tests.ops.test_projected import draw

Function = Callable[..., Tensor]


def scan_inputs(shape: tuple[int, int, int, int] = (2, 4, 3, 6), groups: int | None = 2, directions: int = 4) -> list:
    return make_inputs(shape, groups, directions, torch.float64, merge=torch.float64).tensors()


def tangents_of(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors)


def jvp(function: Function, tensors: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    y, dy = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    return y, dy


def difference(function: Function, tensors: Sequence[Tensor], tangents: Sequence[Tensor], step: float = 1e-5) -> Tensor:
    ahead, behind = (
        function(*(t + sign * step * dot for t, dot in zip(tensors, tangents, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


def assert_like_reference(function: Function, tensors: Sequence[Tensor], backend: str, **options: Any) -> None:
    tangents = tangents_of(tensors)
    y, dy = jvp(lambda *t: function(*t, backend=backend, **options), tensors, tangents)
    truth, its_tangent = jvp(lambda *t: function(*t, backend="reference", **options), tensors, tangents)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(dy, its_tangent, rtol=1e-12, atol=1e-11)


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 6, 18])),
    grouping=st.sampled_from([1, 2]),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, unique=True),
    window=st.none() | st.integers(1, 6),
    skip=st.booleans(),
)
def test_every_shape_equals_the_reference(
    shape: tuple[int, int, int, int], grouping: int, directions: list[str], window: int | None, skip: bool
) -> None:
    options: dict[str, Any] = {"directions": directions, "window": window}
    groups = shape[3] // grouping
    assert_like_reference(gspn_scan, scan_inputs(shape, groups, len(directions)), "cpu", **options)
    tensors = draw(shape, groups, len(directions))[:6]
    if skip:
        tensors.append(torch.linspace(-1, 1, shape[3] * 3, dtype=torch.float64).view(shape[3], 3))
    assert_like_reference(gspn_scan_from_proxy, tensors, "cpu", **options)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("window", [None, 2])
def test_equals_central_differences(backend: str, groups: int | None, window: int | None) -> None:
    for function, tensors in ((gspn_scan, scan_inputs(groups=groups)), (gspn_scan_from_proxy, draw(groups=groups)[:6])):
        tangents = tangents_of(tensors)

        def run(*inputs: Tensor, function: Function = function) -> Tensor:
            return function(*inputs, window=window, backend=backend)

        y, dy = jvp(run, tensors, tangents)
        torch.testing.assert_close(y, run(*tensors), rtol=1e-12, atol=1e-12)
        error = (dy - difference(run, tensors, tangents)).abs().max() / dy.abs().max()
        assert error < 1e-6


@pytest.mark.parametrize("position", range(5))
def test_one_dual_input_among_plain_ones(backend: str, position: int) -> None:
    tensors, tangents = scan_inputs(), tangents_of(scan_inputs())
    only = [dot if i == position else torch.zeros_like(dot) for i, dot in enumerate(tangents)]
    _, expected = jvp(lambda *t: gspn_scan(*t, backend="reference"), tensors, only)
    with forward_ad.dual_level():
        tensors[position] = forward_ad.make_dual(tensors[position], tangents[position])
        dual = forward_ad.unpack_dual(gspn_scan(*tensors, backend=backend))
    assert dual.tangent is not None
    torch.testing.assert_close(dual.tangent, expected, rtol=1e-12, atol=1e-12)


def test_the_values_have_the_bits_of_a_scan_without_tangents() -> None:
    tensors = make_inputs((2, 5, 6, 40)).tensors()
    y, _ = jvp(lambda *t: gspn_scan(*t, backend="cpu"), tensors, tangents_of(tensors))
    assert torch.equal(y, gspn_scan(*tensors, backend="cpu"))


@pytest.mark.parametrize("function", [gspn_scan, gspn_scan_from_proxy])
def test_gradients_of_values_and_of_tangents(backend: str, function: Function) -> None:
    """Weights that require a gradient, in `torch.func.jvp` outside of `no_grad`."""
    tensors = scan_inputs() if function is gspn_scan else draw()[:6]
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def gradients(name: str) -> list[Tensor]:
        y, dy = jvp(lambda *t: function(*t, window=2, backend=name), leaves, tangents_of(leaves))
        of_values = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        return [*of_values, *torch.autograd.grad(dy.square().sum(), leaves)]

    for gradient, truth in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("function", [gspn_scan, gspn_scan_from_proxy])
def test_without_gradients(backend: str, function: Function) -> None:
    leaves = [tensor.requires_grad_() for tensor in (scan_inputs() if function is gspn_scan else draw()[:6])]
    tangents = tangents_of(leaves)
    _, expected = jvp(lambda *t: function(*t, backend="reference"), [leaf.detach() for leaf in leaves], tangents)
    with torch.no_grad():
        _, dy = jvp(lambda *t: function(*t, backend=backend), leaves, tangents)
    assert not dy.requires_grad
    torch.testing.assert_close(dy, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_tangents_have_the_dtype_of_the_values(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs((2, 6, 5, 16), 4, dtype=dtype)
    tensors, tangents = inputs.tensors(), tangents_of(inputs.tensors())
    _, dy = jvp(lambda *t: gspn_scan(*t, backend="cpu"), tensors, tangents)
    wide = [tensor.double() for tensor in tensors], [dot.double() for dot in tangents]
    _, truth = jvp(lambda *t: gspn_scan(*t, backend="reference"), *wide)
    assert dy.dtype == dtype
    assert (dy.double() - truth).abs().max() < tolerance * truth.abs().max()


def test_unused_logits_and_their_tangents_reach_nothing() -> None:
    tensors = make_inputs((1, 4, 3, 2), directions=1, dtype=torch.float64, merge=torch.float64).tensors()
    tangents = tangents_of(tensors)

    def run(*inputs: Tensor) -> Tensor:
        return gspn_scan(*inputs, directions=("down",), window=2, backend="cpu")

    expected = jvp(run, tensors, tangents)
    for tensor in (tensors[1], tangents[1]):
        tensor[:, [0, 2]] = torch.nan
        tensor[:, :, 0, :, 0] = tensor[:, :, -1, :, 2] = torch.nan
    for actual, clean in zip(jvp(run, tensors, tangents), expected, strict=True):
        assert torch.equal(actual, clean)


def test_twice_in_forward_mode() -> None:
    tensors = scan_inputs()
    tangents = tangents_of(tensors)

    def second(backend: str) -> Tensor:
        def first(*inputs: Tensor) -> Tensor:
            return jvp(lambda *t: gspn_scan(*t, backend=backend), inputs, tangents)[1]

        return jvp(first, tensors, tangents)[1]

    assert second("reference").abs().max() > 1
    torch.testing.assert_close(second("cpu"), second("reference"), rtol=1e-10, atol=1e-10)


def test_kernels_of_other_devices_say_that_the_reference_has_it() -> None:
    tensors = [tensor.to("meta") for tensor in scan_inputs()]
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* for meta: use backend='reference'"):
        jvp(lambda *t: gspn_scan(*t), tensors, tensors)


# -- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(function: Function, whole: bool) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=whole)


def scan(*tensors: Tensor) -> Tensor:
    return gspn_scan(*tensors, backend="cpu")


def dual_tangent(function: Function, tensors: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor | None:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, dot) for tensor, dot in zip(tensors, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


def ways(whole: bool, tensors: list[Tensor], tangents: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor | None]]:
    """Every way in which tangents could get into compiled code."""

    def around() -> Tensor:
        return compiled(lambda *t: jvp(scan, t[:5], t[5:])[1], whole)(*tensors, *tangents)

    def inside() -> Tensor:
        return jvp(compiled(scan, whole), tensors, tangents)[1]

    def inside_duals() -> Tensor | None:
        return dual_tangent(compiled(scan, whole), tensors, tangents)

    def compiled_before() -> Tensor | None:
        function = compiled(scan, whole)
        function(*tensors)
        return dual_tangent(function, tensors, tangents)

    return {"around": around, "inside": inside, "inside, duals": inside_duals, "compiled before": compiled_before}


@pytest.mark.parametrize("way", ["around", "inside", "inside, duals", "compiled before"])
def test_compiled_code_drops_no_tangent(way: str) -> None:
    """What may fall back to eager code gives the derivative; what must be one graph is refused."""
    tensors = scan_inputs((1, 2, 3, 2))
    tangents = tangents_of(tensors)
    _, expected = jvp(scan, tensors, tangents)
    actual = ways(False, tensors, tangents)[way]()
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        ways(True, tensors, tangents)[way]()
    torch._dynamo.reset()
    ours = "torch.compile does not take the forward-mode derivative of a scan: leave the model uncompiled in jvp"
    assert way != "around" or ours in str(raised.value)
