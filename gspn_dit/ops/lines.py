"""Forward and hand-derived backward of the scan, line by line in plain PyTorch: the kernels for any machine.

The backward needs the inputs alone: it recomputes the states h and walks the lines in the opposite order. With
g = grad_y, w_k and h as in `reference`, m the merge weight of the direction, and per channel c:

    dh[i, n]   = m u[i, n] g[i, n] + sum_k w_k[i+1, n-k] dh[i+1, n-k]      (i+1: the line visited next)
    grad u     = m g h          grad m = sum g u h
    grad lambda = x dh          grad x  = sum over directions of lambda dh
    dw_k[i, n] = sum over the channels of a group of dh[i, n] h[i-1, n+k]
    grad l_k   = w_k sigmoid(-l_k) (dw_k - sum_j w_j dw_j)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.ops.contract import compute_dtype, without_autocast
from gspn_dit.ops.reference import (
    as_lines,
    propagation_weights,
    scan_reference,
    scan_states,
    visiting_order,
)

scan_forward = scan_reference


def _to_groups(tensor: Tensor, groups: int) -> Tensor:
    """Sum [..., C] over the channels of each group: [..., G]."""
    channels = tensor.shape[-1]
    return tensor if groups == channels else tensor.unflatten(-1, (groups, channels // groups)).sum(-1)


def _to_channels(tensor: Tensor, channels: int) -> Tensor:
    """Repeat [..., G] for the channels of each group: [..., C]."""
    groups = tensor.shape[-1]
    return tensor if groups == channels else tensor.repeat_interleave(channels // groups, dim=-1)


def _sum_in_order(tensor: Tensor) -> Tensor:
    """Sum all elements, in an order that does not depend on the number of threads as that of `Tensor.sum` does."""
    row = 1024  # so few that torch gives a row to one thread
    sums = tensor.flatten()
    while sums.numel() > 1:
        sums = F.pad(sums, (0, -sums.numel() % row)).view(-1, row).sum(dim=1)
    return sums.squeeze(0)


def _shifted(tensor: Tensor, k: int) -> Tensor:
    """Return t[:, n + k] for every position n of [B, N, C], zero off the line."""
    positions = tensor.shape[1]
    return F.pad(tensor, (0, 0, 1, 1))[:, 1 + k : 1 + k + positions]


def _state_gradients(weights: Tensor, incoming: Tensor, order: list[tuple[int, bool]]) -> Tensor:
    """Run dh along the reversed visiting order; incoming = m u g and the result are [B, lines, N, C]."""
    gradients: list[Tensor] = [torch.empty(0)] * len(order)
    carried: Tensor | None = None
    for line, restart in reversed(order):
        gradient = incoming[:, line] if carried is None else incoming[:, line] + carried
        gradients[line] = gradient
        carried = None
        if not restart:
            weighted = [_to_channels(weights[:, line, :, k], gradient.shape[-1]) * gradient for k in range(3)]
            carried = _shifted(weighted[0], 1) + weighted[1] + _shifted(weighted[2], -1)
    return torch.stack(gradients, dim=1)


def _logit_gradients(
    logits: Tensor, weights: Tensor, states: Tensor, gradients: Tensor, order: list[tuple[int, bool]]
) -> Tensor:
    """Return the gradient of the logits [B, lines, N, 3, G]; exactly 0 where an entry is not used."""
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    before = None
    for line, restart in order:
        if not restart:
            assert before is not None
            previous, gradient, weight = states[:, before], gradients[:, line], weights[:, line]
            of_weights = torch.stack(
                [_to_groups(gradient * _shifted(previous, k), logits.shape[-1]) for k in (-1, 0, 1)], dim=2
            )
            centred = of_weights - (weight * of_weights).sum(dim=2, keepdim=True)
            # As an exponential, because torch's sigmoid rounds a value by where in memory it lies.
            used = weight * F.logsigmoid(-logits[:, line]).exp() * centred
            # A neighbour off the line has weight 0, but its logit may be NaN.
            result[:, line] = torch.where(weight == 0, torch.zeros_like(used), used)
        before = line
    return result


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight_logits, input_gate, output_gate and merge_weight, each like its input."""
    dtype = compute_dtype(x.dtype)
    inputs = (x, weight_logits, input_gate, output_gate)
    grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
    grad_weight_logits, grad_input_gate, grad_output_gate = (
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in inputs[1:]
    )
    grad_merge = torch.zeros(merge_weight.shape, dtype=dtype, device=x.device)
    with without_autocast(x.device.type):
        for d, direction in enumerate(directions if x.numel() else ()):
            x_lines, grad_y_lines, weight_logits_lines, input_gate_lines, output_gate_lines = (
                as_lines(t, direction).to(dtype)
                for t in (
                    x,
                    grad_y,
                    weight_logits[..., d, :, :],
                    input_gate[..., d, :],
                    output_gate[..., d, :],
                )
            )
            merge = merge_weight[d].to(dtype)
            order = visiting_order(x_lines.shape[1], direction, window)
            weights = propagation_weights(weight_logits_lines, order)
            states = scan_states(weights, input_gate_lines * x_lines, order)
            gradients = _state_gradients(weights, merge * output_gate_lines * grad_y_lines, order)
            as_lines(grad_x, direction).add_(input_gate_lines * gradients)
            as_lines(grad_input_gate[..., d, :], direction).copy_(x_lines * gradients)
            as_lines(grad_output_gate[..., d, :], direction).copy_(merge * grad_y_lines * states)
            grad_merge[d] = _sum_in_order(grad_y_lines * output_gate_lines * states)
            of_logits = _logit_gradients(weight_logits_lines, weights, states, gradients, order)
            as_lines(grad_weight_logits[..., d, :, :], direction).copy_(of_logits)
    return grad_x.to(x.dtype), grad_weight_logits, grad_input_gate, grad_output_gate, grad_merge.to(merge_weight.dtype)
