"""The projected scan with its logits and gates in memory, by a scan's own kernels.

For devices without fused kernels, and where those do not pay. The backward pass repeats the projections, so that of 20
values per token and channel none is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gspn_dit.ops.contract import without_autocast


def project(proxy: Tensor, weights: Sequence[Tensor], directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight logits [..., D, 3, G] and the two gates [..., D, C], linear maps of the proxy [..., P]."""
    weight_logits, input_gate, output_gate = (F.linear(proxy, weight) for weight in weights)
    return (
        weight_logits.unflatten(-1, (directions, 3, weight_logits.shape[-1] // (3 * directions))),
        input_gate.unflatten(-1, (directions, input_gate.shape[-1] // directions)),
        output_gate.unflatten(-1, (directions, output_gate.shape[-1] // directions)),
    )


def projected_forward(
    scan_forward: Callable[..., Tensor],
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute the projected scan for checked arguments; `weights` are those of the logits and the two gates."""
    with without_autocast(x.device.type):
        projected = project(proxy, weights, len(directions))
        y = scan_forward(x, *projected, merge_weight, directions, window)
        return y if skip_weight is None else y + F.linear(proxy, skip_weight) * x


def projected_backward(
    scan_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
    grad_y: Tensor,
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, proxy, the three weights, the merge weight and the skip weight ([0] without)."""
    with without_autocast(x.device.type):
        projected = project(proxy, weights, len(directions))
        grad_x, *grad_projected, grad_merge = scan_backward(grad_y, x, *projected, merge_weight, directions, window)
        del projected
        gradients = [gradient.flatten(0, 2).flatten(1) for gradient in grad_projected]
        if skip_weight is not None:
            grad_x = grad_x + F.linear(proxy, skip_weight) * grad_y
            gradients.append((grad_y * x).flatten(0, 2))
            weights = [*weights, skip_weight]
        rows = proxy.flatten(0, -2)
        # These products are skinny, P columns wide: laid out with P rows they run many times faster on a CPU.
        transposed: Any = sum(weight.T @ gradient.T for gradient, weight in zip(gradients, weights, strict=True))
        grad_weights = [(rows.T @ gradient).T.contiguous() for gradient in gradients]
    grad_skip = grad_weights.pop() if skip_weight is not None else x.new_empty(0)
    grad_logits, grad_in, grad_out = grad_weights
    grad_proxy = transposed.T.reshape(proxy.shape).contiguous()
    return grad_x, grad_proxy, grad_logits, grad_in, grad_out, grad_merge, grad_skip
