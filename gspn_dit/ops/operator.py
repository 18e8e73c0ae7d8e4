"""The operators of the scan, registered with `torch.library`: `gspn_dit::scan_forward` and `gspn_dit::scan_backward`.

torch.compile, DDP, FSDP and activation checkpointing see normal operators. Directions are integer codes, `window`
0 stands for a single segment. The kernels of a device are added with `register_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gspn_dit.ops.cpu import binding as cpu
from gspn_dit.ops.cuda import binding as cuda

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("gspn_dit::scan_forward", mutates_args=(), device_types="cpu")
def scan_forward(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the scan; arguments as in `gspn_scan`, already checked; returns a new contiguous [B, H, W, C]."""
    return cpu.scan_forward(x, weight_logits, input_gate, output_gate, merge_weight, directions, window)


@torch.library.custom_op("gspn_dit::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> _Gradients:
    """Return new contiguous gradients of the five tensors, each with the shape and dtype of its input."""
    return cpu.scan_backward(grad_y, x, weight_logits, input_gate, output_gate, merge_weight, directions, window)


@scan_forward.register_fake
def _(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@scan_backward.register_fake
def _(grad_y: Tensor, *inputs: Any) -> _Gradients:
    x, weight_logits, input_gate, output_gate, merge_weight = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:5]
    )
    return x, weight_logits, input_gate, output_gate, merge_weight


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.directions, ctx.window = inputs[5], inputs[6]


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    return *scan_backward(grad_y, *ctx.saved_tensors, ctx.directions, ctx.window), None, None


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "gspn_scan has no double derivative in its kernels: use gspn_scan(..., backend='reference')"
    )


scan_forward.register_autograd(_differentiate, setup_context=_save_inputs)
scan_backward.register_autograd(_refuse)
scan_forward.register_kernel("cuda")(cuda.scan_forward)
scan_backward.register_kernel("cuda")(cuda.scan_backward)
