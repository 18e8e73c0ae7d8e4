"""Linear maps that keep what their input was made from, and recompute it in the backward pass.

A linear map saves its input for its weight's gradient. Where that input is a cheap function of a tensor that is kept
anyway, a block stores the same values twice or three times; these functions store them once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.ops.contract import autocast_dtype, without_autocast
from gspn_dit.ops.forward_mode import in_forward_mode


def _normalise(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer-normalised tokens, and mean and 1/std of each."""
    normalised, mean, inverse_std = torch.native_layer_norm(x, [x.shape[-1]], scale, shift, epsilon)
    return normalised, mean, inverse_std


def _linear_gradients(grad_y: Tensor, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a linear map's input and weight."""
    return grad_y @ weight, grad_y.flatten(0, -2).T @ inputs.flatten(0, -2)


# Neither function has a `jvp`: torch.compile does not trace one, and PyTorch does not differentiate one in forward mode
# again. Where forward mode is on the ordinary operations run instead, which have every derivative.


class _NormLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return F.linear(_normalise(x, scale, shift, epsilon)[0].to(weight.dtype), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.epsilon = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        with without_autocast(x.device.type):
            normalised, mean, inverse_std = _normalise(x, scale, shift, ctx.epsilon)
            grad_normalised, grad_weight = _linear_gradients(grad_outputs[0], normalised.to(weight.dtype), weight)
            grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
                grad_normalised.to(x.dtype), x, [x.shape[-1]], mean, inverse_std, scale, shift, [True, True, True]
            )
        return grad_x, grad_scale, grad_shift, grad_weight, None


class _SquaredReLULinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear((x * F.relu(x)).to(weight.dtype), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with without_autocast(x.device.type):
            positive = F.relu(x)
            squared = (x * positive).to(weight.dtype)
            grad_squared, grad_weight = _linear_gradients(grad_outputs[0], squared, weight)
            return grad_squared.to(x.dtype) * (2 * positive), grad_weight


def norm_linear(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute `linear(layer_norm(x, scale, shift), weight)`, keeping x alone for the backward pass.

    Args:
        x: [..., C].
        scale, shift: [C], the affine part of the normalisation, in x's dtype.
        weight: [K, C].
        epsilon: added to the variance.

    Returns:
        [..., K] in x's dtype, or the active autocast dtype.
    """
    if (dtype := autocast_dtype(x.device.type)) is not None:  # as autocast does: float32 inside the normalisation
        x, scale, shift, weight = x.float(), scale.float(), shift.float(), weight.to(dtype)
    with without_autocast(x.device.type):
        if in_forward_mode():
            return F.linear(F.layer_norm(x, x.shape[-1:], scale, shift, epsilon).to(weight.dtype), weight)
        return _NormLinear.apply(x, scale, shift, weight, epsilon)


def squared_relu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `linear(x · relu(x), weight)`, keeping x alone for the backward pass.

    Args:
        x: [..., C].
        weight: [K, C].

    Returns:
        [..., K] in x's dtype, or the active autocast dtype.
    """
    if (dtype := autocast_dtype(x.device.type)) is not None:
        weight = weight.to(dtype)
    with without_autocast(x.device.type):
        if in_forward_mode():
            return F.linear((x * F.relu(x)).to(weight.dtype), weight)
        return _SquaredReLULinear.apply(x, weight)
