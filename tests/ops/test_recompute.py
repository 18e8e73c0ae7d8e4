"""Linear maps that recompute their input: the values, gradients and dtypes of the ordinary operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from gspn_dit.ops.recompute import norm_linear, squared_relu_linear


def plain_norm_linear(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], scale, shift, 1e-6), weight)


def plain_squared_relu_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x * F.relu(x), weight)


PAIRS = {
    "norm": (lambda *tensors: norm_linear(*tensors, 1e-6), plain_norm_linear, [(2, 3, 8), (8,), (8,), (5, 8)]),
    "squared_relu": (squared_relu_linear, plain_squared_relu_linear, [(2, 3, 8), (5, 8)]),
}


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_the_ordinary_operations(name: str) -> None:
    recomputed, plain, shapes = PAIRS[name]
    tensors = draw(shapes, torch.float64)
    y, expected = recomputed(*tensors), plain(*tensors)
    assert torch.equal(y, expected)
    upstream = torch.cos(torch.arange(y.numel()).double()).reshape(y.shape)
    gradients = torch.autograd.grad(y, tensors, upstream)
    for one, other in zip(gradients, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck(name: str) -> None:
    recomputed, _, shapes = PAIRS[name]
    assert torch.autograd.gradcheck(recomputed, draw(shapes, torch.float64))


@pytest.mark.parametrize("name", PAIRS)
def test_autocast_casts_what_it_casts_in_the_ordinary_operations(name: str) -> None:
    recomputed, plain, shapes = PAIRS[name]
    tensors = draw(shapes, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = recomputed(*tensors), plain(*tensors)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for gradient in torch.autograd.grad(y.float().square().sum(), tensors):
        assert gradient.dtype == torch.float32


def transformed(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    """What the transforms of `torch.func` make of a function at a point, alone and one of the other."""
    every, tangents = tuple(range(len(tensors))), tuple(torch.cos(tensor) for tensor in tensors)

    def loss(*inputs: Tensor) -> Tensor:
        return function(*inputs).square().sum()

    def change(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: jvp(of, inputs, tangents)[1]

    def size_of_gradient(*inputs: Tensor) -> Tensor:
        return torch.stack([gradient.square().sum() for gradient in grad(loss, every)(*inputs)]).sum()

    return {
        "grad": grad(loss, every)(*tensors),
        "jacrev": jacrev(function, every)(*tensors),
        "jacfwd": jacfwd(function, every)(*tensors),
        "per sample": vmap(grad(loss), (0, *[None] * len(every[1:])))(*tensors),
        "grad of grad": grad(size_of_gradient, every)(*tensors),
        "grad of jvp": grad(change(loss), every)(*tensors),
        "jvp of grad": change(grad(loss, every))(*tensors),
        "jvp of jvp": change(change(function))(*tensors),
    }


@pytest.mark.parametrize("name", PAIRS)
def test_transforms_are_those_of_the_ordinary_operations(name: str) -> None:
    recomputed, plain, shapes = PAIRS[name]
    tensors = tuple(tensor.detach() for tensor in draw(shapes, torch.float64))
    actual, expected = transformed(recomputed, tensors), transformed(plain, tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_keeps_its_arguments_alone_for_the_backward_pass(name: str) -> None:
    recomputed, _, shapes = PAIRS[name]
    tensors, kept = draw(shapes, torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: _):
        recomputed(*tensors)
    assert kept == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("name", PAIRS)
def test_compiles_in_one_graph(name: str) -> None:
    recomputed, _, shapes = PAIRS[name]
    tensors = draw(shapes, torch.float64)
    torch._dynamo.reset()
    y = torch.compile(recomputed, fullgraph=True, backend="aot_eager")(*tensors)
    expected = recomputed(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(y.square().sum(), tensors)
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)
