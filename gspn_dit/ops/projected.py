"""The scan behind its linear maps, keeping only the proxy for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspn_dit.ops import operator
from gspn_dit.ops.backends import resolve_backend
from gspn_dit.ops.contract import DIRECTIONS, autocast_dtype, check_arguments, direction_codes, without_autocast
from gspn_dit.ops.cpu.binding import output_memory
from gspn_dit.ops.scan import gspn_scan


def _linear(proxy: Tensor, weight: Tensor) -> Tensor:
    """Map the proxy; on a CPU into memory that is used again, where fresh pages would cost more than the product."""
    plain = type(proxy) is Tensor and proxy.device.type == "cpu"  # a fake tensor has no memory to borrow
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(proxy, weight)
    shape = torch.Size([*proxy.shape[:-1], len(weight)])
    (result,) = output_memory.empty([shape], proxy.dtype)
    return torch.mm(proxy.flatten(0, -2), weight.T, out=result.view(-1, len(weight))).view(shape)


def _project(proxy: Tensor, weights: Sequence[Tensor], directions: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [..., D, 3, G] and the two gates [..., D, C] as contiguous linear maps of the proxy."""
    logits, input_gate, output_gate = (_linear(proxy, weight) for weight in weights)
    return (
        logits.unflatten(-1, (directions, 3, logits.shape[-1] // (3 * directions))),
        input_gate.unflatten(-1, (directions, channels)),
        output_gate.unflatten(-1, (directions, channels)),
    )


class _RecomputedScan(torch.autograd.Function):
    """Runs projections and scan, and repeats the projections in the backward pass instead of storing them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, proxy: Tensor, merge_weight: Tensor, codes: list[int], window: int | None,
                *weights: Tensor) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, proxy, merge_weight, *weights)
        ctx.codes, ctx.window = codes, window or 0
        projected = _project(proxy, weights, len(codes), x.shape[-1])
        check_arguments(x, *projected, merge_weight, len(codes), window)  # the kernels trust what they are given
        return operator.scan_forward(x, *projected, merge_weight, codes, ctx.window)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_outputs[0].device.type):  # the projections must have the dtype of the forward pass
            return _RecomputedScan._backward(ctx, *grad_outputs)

    @staticmethod
    def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, proxy, merge_weight, *weights = ctx.saved_tensors
        projected = _project(proxy, weights, len(ctx.codes), x.shape[-1])
        grad_x, *of_projected, grad_merge = operator.scan_backward(
            grad_y, x, *projected, merge_weight, ctx.codes, ctx.window
        )
        del projected
        rows = proxy.flatten(0, -2)
        gradients = [gradient.flatten(0, 2).flatten(1) for gradient in of_projected]
        # Both products are skinny, P columns wide: laid out with P rows they run many times faster on a CPU.
        transposed = sum(weight.T @ gradient.T for gradient, weight in zip(gradients, weights, strict=True))
        assert isinstance(transposed, Tensor)
        of_weights = [(rows.T @ gradient).T for gradient in gradients]
        return grad_x, transposed.T.reshape(proxy.shape), grad_merge, None, None, *of_weights


def gspn_scan_from_proxy(
    x: Tensor,
    proxy: Tensor,
    logits_weight: Tensor,
    input_gate_weight: Tensor,
    output_gate_weight: Tensor,
    merge_weight: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `gspn_scan` with logits and gates that are linear maps of a narrow proxy of the tokens.

    The logits and gates (20 values per token and channel for four directions) dwarf every other activation; they
    are not kept for the backward pass but computed again from the proxy.

    Args:
        x: tokens [B, H, W, C].
        proxy: [B, H, W, P].
        logits_weight: [D·3·G, P], the map to `weight_logits`.
        input_gate_weight: [D·C, P], the map to `input_gate`.
        output_gate_weight: [D·C, P], the map to `output_gate`.
        merge_weight: [D].
        directions, window, backend: as in `gspn_scan`.

    Returns:
        y [B, H, W, C], in x's dtype, or the active autocast dtype.

    Raises:
        ValueError, BackendUnavailableError: as `gspn_scan`.
    """
    codes = direction_codes(directions)
    weights: tuple[Tensor, ...] = (logits_weight, input_gate_weight, output_gate_weight)
    if (dtype := autocast_dtype(x.device.type)) is not None:
        x, proxy = x.to(dtype), proxy.to(dtype)
        weights = tuple(weight.to(dtype) for weight in weights)

    def run(x: Tensor, proxy: Tensor, *weights: Tensor) -> Tensor:
        projected = _project(proxy, weights, len(codes), x.shape[-1])
        return gspn_scan(x, *projected, merge_weight, directions=directions, window=window, backend=backend)

    with without_autocast(x.device.type):
        if not torch.is_grad_enabled():
            return run(x, proxy, *weights)
        if resolve_backend(backend, x.device) == "reference":
            return checkpoint(run, x, proxy, *weights, use_reentrant=False)
        return _RecomputedScan.apply(x, proxy, merge_weight, codes, window, *weights)
