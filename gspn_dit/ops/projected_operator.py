"""The operators `gspn_dit::projected_scan_forward` and `projected_scan_backward`, by the conventions of `operator`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gspn_dit.ops.cpu import projected as cpu
from gspn_dit.ops.cuda import binding as cuda

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("gspn_dit::projected_scan_forward", mutates_args=(), device_types="cpu")
def projected_scan_forward(
    x: Tensor,
    proxy: Tensor,
    logits_weight: Tensor,
    input_gate_weight: Tensor,
    output_gate_weight: Tensor,
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the projected scan; arguments as in `gspn_scan_from_proxy`, checked; returns a new [B, H, W, C]."""
    weights = (logits_weight, input_gate_weight, output_gate_weight)
    return cpu.scan_forward(x, proxy, weights, merge_weight, skip_weight, directions, window)


@torch.library.custom_op("gspn_dit::projected_scan_backward", mutates_args=(), device_types="cpu")
def projected_scan_backward(
    grad_y: Tensor,
    x: Tensor,
    proxy: Tensor,
    logits_weight: Tensor,
    input_gate_weight: Tensor,
    output_gate_weight: Tensor,
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> _Gradients:
    """Return new contiguous gradients of the seven tensors, each like its input; [0] for no skip weight."""
    weights = (logits_weight, input_gate_weight, output_gate_weight)
    return cpu.scan_backward(grad_y, x, proxy, weights, merge_weight, skip_weight, directions, window)


@projected_scan_forward.register_kernel("cuda")
def _(x: Tensor, proxy: Tensor, logits: Tensor, input_gate: Tensor, output_gate: Tensor, *others: Any) -> Tensor:
    return cuda.projected_forward(x, proxy, (logits, input_gate, output_gate), *others)


@projected_scan_backward.register_kernel("cuda")
def _(
    grad_y: Tensor, x: Tensor, proxy: Tensor, logits: Tensor, input_gate: Tensor, output_gate: Tensor, *others: Any
) -> _Gradients:
    return cuda.projected_backward(grad_y, x, proxy, (logits, input_gate, output_gate), *others)


@projected_scan_forward.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@projected_scan_backward.register_fake
def _(grad_y: Tensor, *inputs: Any) -> _Gradients:
    x, proxy, weight_logits, input_gate, output_gate, merge_weight = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:6]
    )
    skip = inputs[6]
    skip = x.new_empty(0) if skip is None else torch.empty_like(skip, memory_format=torch.contiguous_format)
    return x, proxy, weight_logits, input_gate, output_gate, merge_weight, skip


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.directions, ctx.window = inputs[7], inputs[8]


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing lets go of what was read
    *gradients, grad_skip = projected_scan_backward(grad_y, *saved, ctx.directions, ctx.window)
    return *gradients, None if saved[6] is None else grad_skip, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "gspn_scan_from_proxy has no double derivative in its kernels: "
        "use gspn_scan_from_proxy(..., backend='reference')"
    )


projected_scan_forward.register_autograd(_differentiate, setup_context=_save_inputs)
projected_scan_backward.register_autograd(_refuse)
