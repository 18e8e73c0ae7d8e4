"""Derivatives of the scan: against finite differences, higher and forward-mode ones, dtypes, aliasing, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gspn_dit.ops import gspn_scan
from tests.ops.scan_cases import (
    DTYPES,
    NAMES,
    STRIDES,
    Inputs,
    assert_close,
    check_against_reference,
    lay_out,
    make_inputs,
    scan_and_gradients,
)


def small_leaves() -> tuple[Tensor, ...]:
    """Few enough float64 numbers for finite differences; all four directions, windows of 2 do not divide 3."""
    return tuple(make_inputs((1, 3, 3, 2), 1, dtype=torch.float64, merge=torch.float64).leaves().tensors())


@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck_in_all_five_tensors(backend: str, window: int | None) -> None:
    assert torch.autograd.gradcheck(lambda *t: gspn_scan(*t, window=window, backend=backend), small_leaves())


@pytest.mark.parametrize("window", [None, 2])
def test_reference_in_forward_mode(window: int | None) -> None:
    def scan(*tensors: Tensor) -> Tensor:
        return gspn_scan(*tensors, window=window, backend="reference")

    leaves = tuple(make_inputs((1, 2, 3, 1), dtype=torch.float64, merge=torch.float64).leaves().tensors())
    assert torch.autograd.gradcheck(scan, leaves, check_forward_ad=True, check_backward_ad=False)


def test_reference_twice() -> None:
    leaves = tuple(make_inputs((1, 2, 3, 1), dtype=torch.float64, merge=torch.float64).leaves().tensors())
    assert torch.autograd.gradgradcheck(lambda *t: gspn_scan(*t, window=2, backend="reference"), leaves)


def test_kernels_refuse_a_double_derivative() -> None:
    leaves = make_inputs((1, 2, 2, 2)).leaves()
    y = gspn_scan(*leaves, backend="cpu")
    (grad_x,) = torch.autograd.grad(y.square().sum(), leaves.x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double derivative.*backend='reference'"):
        grad_x.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", ["none", "float32", "like x"])
def test_dtypes_and_accuracy(backend: str, dtype: torch.dtype, merge: str) -> None:
    """y has x's dtype, each gradient its input's; a 16-bit result is the exact one rounded once."""
    of_merge = {"none": None, "float32": torch.float32, "like x": dtype}[merge]
    check_against_reference(make_inputs((2, 7, 6, 4), 2, dtype=dtype, merge=of_merge), window=4, backend=backend)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend: str, strides: str, dtype: torch.dtype) -> None:
    check_against_reference(make_inputs((2, 5, 6, 4), 2, dtype=dtype, strides=strides), window=4, backend=backend)


def test_no_merge_weight_stands_for_ones(backend: str) -> None:
    inputs = make_inputs((1, 3, 3, 2), merge=None)
    ones = inputs._replace(merge_weight=torch.ones(4))
    assert torch.equal(gspn_scan(*inputs, backend=backend), gspn_scan(*ones, backend=backend))


@pytest.mark.parametrize("strides", STRIDES)
def test_inputs_and_upstream_gradient_are_left_alone(backend: str, strides: str) -> None:
    inputs = make_inputs((2, 3, 4, 4), 2, strides=strides).leaves()
    grad_y = lay_out(torch.randn(2, 3, 4, 4), strides)
    watched = [*inputs.tensors(), grad_y]
    before = [(tensor.detach().clone(), tensor._version) for tensor in watched]
    y = gspn_scan(*inputs, backend=backend)
    y_before = y.detach().clone()
    first = torch.autograd.grad(y, inputs.tensors(), grad_y, retain_graph=True)
    second = torch.autograd.grad(y, inputs.tensors(), grad_y)
    for tensor, (copy, version) in zip(watched, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version
    assert torch.equal(y, y_before)
    for gradient, again in zip(first, second, strict=True):
        assert torch.equal(gradient, again)
        assert all(gradient.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in watched)


def test_an_expanded_upstream_gradient(backend: str) -> None:
    """`y.sum().backward()` hands over one number with strides of 0."""
    leaves = make_inputs((2, 3, 4, 4), 2).leaves()
    gspn_scan(*leaves, backend=backend).sum().backward()
    _, expected = scan_and_gradients(leaves, torch.ones(2, 3, 4, 4), backend=backend)
    for leaf, gradient in zip(leaves.tensors(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    inputs = make_inputs((2, 3, 4, 4), 2)
    grad_y = torch.randn(2, 3, 4, 4)
    position = NAMES.index(wanted)
    tensors = [t.detach().requires_grad_(i == position) for i, t in enumerate(inputs.tensors())]
    (gradient,) = torch.autograd.grad(gspn_scan(*tensors, backend=backend), tensors[position], grad_y)
    assert torch.equal(gradient, scan_and_gradients(inputs, grad_y, backend=backend)[1][position])


def test_no_graph_is_built_where_none_is_asked_for(backend: str) -> None:
    leaves = make_inputs((1, 3, 3, 2)).leaves()
    expected = gspn_scan(*leaves, backend=backend)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = gspn_scan(*leaves, backend=backend)
            assert not y.requires_grad
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    """Under autocast the tokens, logits and gates are cast, the merge weight and the accumulation are not."""
    inputs = make_inputs((2, 5, 6, 4), 2, dtype=dtype).leaves()
    grad_y = torch.randn(2, 5, 6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = gspn_scan(*inputs, backend=backend)
        gradients = torch.autograd.grad(y, inputs.tensors(), grad_y)
    rounded = Inputs(*(t.bfloat16() for t in inputs[:4]), inputs.merge_weight)
    expected, expected_gradients = scan_and_gradients(rounded, grad_y, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert_close(y, scan_and_gradients(rounded.wide(), grad_y.double())[0], "y")
    for leaf, gradient, other in zip(inputs.tensors(), gradients, expected_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert torch.equal(gradient, other.to(leaf.dtype))


def test_autocast_mends_mixed_dtypes(backend: str) -> None:
    inputs = make_inputs((1, 3, 4, 2))
    mixed = inputs._replace(x=inputs.x.bfloat16(), input_gate=inputs.input_gate.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = gspn_scan(*mixed, backend=backend)
    rounded = (t.bfloat16() for t in inputs[:4])
    assert torch.equal(y, gspn_scan(*rounded, inputs.merge_weight, backend=backend))
