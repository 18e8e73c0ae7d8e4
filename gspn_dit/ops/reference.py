"""The ground truth of the scan in plain PyTorch: vectorised over everything but the loop over lines.

Differentiable by autograd any number of times and in forward mode, on any device. Everything is computed in the
accumulation dtype (float32, or float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.ops.contract import compute_dtype, without_autocast

_FLIP = (1, 3)  # "left" and "up" visit the lines from the last to the first
_COLUMNS = (0, 1)  # "right" and "left" have columns as lines


def as_lines(tensor: Tensor, direction: int) -> Tensor:
    """View [B, H, W, ...] as [B, lines, positions, ...] for a direction code; line order is left as it is."""
    return tensor.transpose(1, 2) if direction in _COLUMNS else tensor


def visiting_order(lines: int, direction: int, window: int) -> list[tuple[int, bool]]:
    """Return (line index, whether the state restarts there) in the order a direction visits the lines.

    Segments are cut by absolute index whatever the direction; `window` 0 stands for a single segment.
    """
    window = window or max(lines, 1)
    if direction in _FLIP:
        return [(i, i == lines - 1 or (i + 1) % window == 0) for i in reversed(range(lines))]
    return [(i, i % window == 0) for i in range(lines)]


def propagation_weights(logits: Tensor, order: list[tuple[int, bool]]) -> Tensor:
    """Turn logits [B, lines, positions, 3, G] into row-stochastic weights of the same shape.

    w_k = sigmoid(l_k) / sum of sigmoid(l_k') over neighbours on the line, as a softmax of log-sigmoids, which is
    finite for every finite logit. Entries that are not used (neighbours off the line, first lines of segments) are
    replaced before any arithmetic, so that not even a NaN reaches the result or its gradient.

    The softmax is written out: torch's own rounds a value by where in memory it lies, hence by the number of threads.
    """
    positions = logits.shape[2]
    place = torch.arange(positions)
    absent = torch.stack([place == 0, place < 0, place == positions - 1], dim=1)[..., None]  # [positions, 3, 1]
    restarts = torch.cat([torch.full((1, 1, 1, 1), restart) for _, restart in sorted(order)])  # [lines, 1, 1, 1]
    absent, restarts = absent.to(logits.device), restarts.to(logits.device)
    used = logits.masked_fill(absent | restarts, 0.0)
    log_sigmoids = F.logsigmoid(used).masked_fill(absent, float("-inf"))
    sigmoids = (log_sigmoids - log_sigmoids.detach().amax(dim=-2, keepdim=True)).exp()  # up to a common factor
    minus, same, plus = sigmoids.unbind(dim=-2)
    return sigmoids / (minus + same + plus).unsqueeze(-2)


def neighbour_sum(weights: Tensor, state: Tensor) -> Tensor:
    """Return sum over k of w_k[n] * state[n + k]; weights [B, N, 3, G], state [B, N, C], result [B, N, C]."""
    positions, groups, channels = state.shape[1], weights.shape[-1], state.shape[2]
    padded = F.pad(state, (0, 0, 1, 1))
    if groups != channels:
        padded, weights = padded.unflatten(-1, (groups, channels // groups)), weights.unsqueeze(-1)
    total = sum(weights[:, :, k] * padded[:, k : k + positions] for k in range(3))
    assert isinstance(total, Tensor)
    return total.reshape(state.shape)


def scan_states(weights: Tensor, driven: Tensor, order: list[tuple[int, bool]]) -> Tensor:
    """Run h[i] = W[i] h[i-1] + driven[i] along the visiting order; driven and result are [B, lines, N, C]."""
    if all(restart for _, restart in order):
        # No weight is used; they are all finite here, and stay in the graph with a gradient of zeros.
        return driven + 0 * weights.sum()
    weight_lines, driven_lines = weights.unbind(1), driven.unbind(1)
    states: list[Tensor] = [torch.empty(0)] * len(order)
    previous = torch.empty(0)
    for line, restart in order:
        state = driven_lines[line]
        if not restart:
            state = neighbour_sum(weight_lines[line], previous) + state
        states[line] = previous = state
    return torch.stack(states, dim=1)


def scan_reference(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
) -> Tensor:
    """Compute `gspn_scan` for checked arguments; direction codes, `window` 0 for global; returns x's shape, dtype."""
    dtype = compute_dtype(x.dtype)
    if x.numel() == 0:
        # Nothing to propagate; the sums keep every argument in the graph with a gradient of zeros.
        unused = (weight_logits.sum() + input_gate.sum() + output_gate.sum()) * 0 + merge_weight.sum() * 0
        return (x + unused.to(x.dtype)).contiguous()
    with without_autocast(x.device.type):
        y = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        x_wide = x.to(dtype)  # once, so that its gradient too is summed over the directions before it is rounded
        for d, direction in enumerate(directions):
            x_lines = as_lines(x_wide, direction)
            weight_logits_lines, input_gate_lines, output_gate_lines = (
                as_lines(t, direction).to(dtype)
                for t in (weight_logits[..., d, :, :], input_gate[..., d, :], output_gate[..., d, :])
            )
            order = visiting_order(x_lines.shape[1], direction, window)
            weights = propagation_weights(weight_logits_lines, order)
            states = scan_states(weights, input_gate_lines * x_lines, order)
            y = y + as_lines(merge_weight[d].to(dtype) * output_gate_lines * states, direction)
        return y.to(x.dtype).contiguous()
