"""Forward-mode derivatives of the scan: what `torch.func.jvp` and dual tensors get where a kernel computes the values.

The scan is linear in what drives it. With dotted tangents, w and h as in `reference`, s_k = sigmoid(-l_k):

    dw_k[i, n] = w_k (s_k dl_k - sum_j w_j s_j dl_j)
    dh[i, n]   = sum_k w_k dh[i-1, n+k] + e[i, n]
    e[i, n]    = sum_k dw_k h[i-1, n+k] + d_lambda x + lambda dx
    dy         = sum_d (dm u + m du) h + m u dh

so h of one direction is a scan, and dh a scan of the same weights driven by e: both run in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gspn_dit.ops import operator
from gspn_dit.ops.contract import compute_dtype
from gspn_dit.ops.reference import as_lines, neighbour_sum, propagation_weights, scan_reference, visiting_order


def in_forward_mode() -> bool:
    """Tell whether this runs within a level of forward-mode differentiation, on tensors with tangents or others.

    Raises NotImplementedError where `torch.compile` traces such a level.
    """
    # Read where the compiler sees it: code that was compiled outside of a level is then not used within one.
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "torch.compile does not take the forward-mode derivative of a scan: leave the model uncompiled in jvp"
        )
    return True


def carries_tangent(*tensors: Tensor | None) -> bool:
    """Tell whether a derivative in forward mode is asked for; custom operators would drop it without a word.

    Raises NotImplementedError where `torch.compile` traces such a derivative.
    """
    if not in_forward_mode() or not torch._C._is_fwd_grad_enabled():
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def scan_forward(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the scan with the kernels of CPU tensors, with its derivative in forward mode if one is asked for.

    Arguments are checked, as for the operator pair. Raises NotImplementedError for tangents on other devices.
    """
    inputs = (x, weight_logits, input_gate, output_gate, merge_weight)
    if not carries_tangent(*inputs):
        return operator.scan_forward(*inputs, directions, window)
    if x.device.type != "cpu":
        raise NotImplementedError(
            f"the scan has no forward-mode derivative in its kernels for {x.device.type}: use backend='reference'"
        )
    if _levels() > 1:  # while PyTorch asks a function of one's own for its derivative, it does not note another one
        return scan_reference(*inputs, directions, window)
    return _Scan.apply(*inputs, list(directions), window)


def _levels() -> int:
    """Return how many `torch.func.jvp` are being computed, one inside the other."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return operator.scan_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.directions, ctx.window = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return *operator.scan_backward(*grad_outputs, *ctx.saved_tensors, ctx.directions, ctx.window), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _scan_tangent(ctx.saved_tensors, tangents[:5], ctx.directions, ctx.window)


def _scan_tangent(
    inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], directions: Sequence[int], window: int
) -> Tensor:
    """Return dy for the five tensors of a scan and their tangents, of which some may be None."""
    dtype = compute_dtype(inputs[0].dtype)
    wide = [tensor.to(dtype) for tensor in inputs]
    of = [torch.zeros_like(t) if dot is None else dot.to(dtype) for t, dot in zip(wide, tangents, strict=True)]
    (x, weight_logits, input_gate, output_gate, merge), (dx, d_logits, d_input, d_output, d_merge) = wide, of
    if x.numel() == 0:
        return torch.zeros_like(inputs[0])
    ones = torch.ones_like(x)
    driving, direct = [], torch.zeros_like(x)
    for d, direction in enumerate(directions):
        at = slice(d, d + 1)
        arguments = (x, weight_logits[..., at, :, :], input_gate[..., at, :], ones.unsqueeze(-2), merge.new_ones(1))
        states = scan_forward(*arguments, [direction], window)
        from_weights = _change_of_weights(
            weight_logits[..., d, :, :], d_logits[..., d, :, :], states, direction, window
        )
        driving.append(from_weights + d_input[..., d, :] * x + input_gate[..., d, :] * dx)
        direct = direct + (d_merge[d] * output_gate[..., d, :] + merge[d] * d_output[..., d, :]) * states
    dy = scan_forward(ones, weight_logits, torch.stack(driving, dim=-2), output_gate, merge, directions, window)
    return (direct + dy).to(inputs[0].dtype)


def _change_of_weights(weight_logits: Tensor, d_logits: Tensor, states: Tensor, direction: int, window: int) -> Tensor:
    """Return sum_k dw_k[i, n] h[i-1, n+k] of one direction, [B, H, W, C]; 0 on the first lines of segments."""
    logits, tangent, states = (as_lines(tensor, direction) for tensor in (weight_logits, d_logits, states))
    order = visiting_order(states.shape[1], direction, window)
    weights = propagation_weights(logits, order)
    before, restarts = list(range(len(order))), torch.zeros(len(order), 1, 1, 1, dtype=torch.bool)
    for (previous, _), (line, restart) in pairwise(order):
        before[line] = previous
        restarts[line] = restart
    restarts[order[0][0]] = True
    # Neighbours off the line have weight 0. Entries that are not used are replaced first: they may be NaN.
    unused = (weights == 0) | restarts.to(weights.device)
    changes = torch.sigmoid(-logits.masked_fill(unused, 0.0)) * tangent.masked_fill(unused, 0.0)
    d_weights = weights * (changes - (weights * changes).sum(dim=-2, keepdim=True))
    sums = neighbour_sum(d_weights.flatten(0, 1), states[:, before].flatten(0, 1))
    return as_lines(sums.unflatten(0, states.shape[:2]), direction)
