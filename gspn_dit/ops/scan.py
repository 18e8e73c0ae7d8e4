"""The public scan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gspn_dit.ops.backends import resolve_backend
from gspn_dit.ops.contract import DIRECTIONS, autocast_dtype, check_arguments, direction_codes
from gspn_dit.ops.forward_mode import scan_forward
from gspn_dit.ops.reference import scan_reference


def gspn_scan(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Propagate tokens over the image plane in several directions and merge them (GSPN, arXiv 2501.12381).

    For each direction d the image is read line by line (columns for right and left, rows for down and up), and

        h[i, n] = sum_k w_k[i, n] h[i-1, n+k] + input_gate[i, n] x[i, n],    k in {-1, 0, +1}
        w_k[i, n] = sigmoid(logit_k) / sum of sigmoid(logit_k') over the neighbours that lie on the line
        y = sum_d merge_weight[d] output_gate ⊙ h

    so each propagation matrix is row-stochastic and the recurrence stable. Line i-1 is the one visited just before;
    on the first line h = input_gate x. Every tensor is read and written at its true position.

    Args:
        x: tokens [B, H, W, C], channels last, any strides; float32, float64, bfloat16 or float16.
        weight_logits: [B, H, W, D, 3, G], x's dtype; index 0, 1, 2 of dimension 4 is k = -1, 0, +1 in absolute
            coordinates. G divides C and channel c uses group c·G // C (G = C: GSPN, G < C: shared as in GSPN-2).
        input_gate: [B, H, W, D, C], x's dtype.
        output_gate: [B, H, W, D, C], x's dtype.
        merge_weight: [D], float32 or x's dtype; None stands for ones.
        directions: D ≥ 1 different names among "right", "left", "down", "up".
        window: None for global propagation; else lines are cut into segments [0, s), [s, 2s), … by absolute line
            index and the state restarts in each.
        backend: "auto" (cupy for CUDA tensors, cpu for CPU tensors, the reference where neither can run),
            "reference", "cpu" or "cupy".

    Returns:
        y [B, H, W, C], contiguous, x's dtype. Accumulation is in float32 (float64 for float64). Differentiable in
        the five tensors, on CPUs and through backend="reference" in forward mode too (`torch.func.jvp`; not under
        torch.compile), twice through backend="reference" alone.

    Raises:
        ValueError: a shape, dtype, device, direction, window or backend name breaks the contract.
        BackendUnavailableError: the named backend cannot run here.
    """
    codes = direction_codes(directions)
    if (dtype := autocast_dtype(x.device.type)) is not None:
        x, weight_logits, input_gate, output_gate = (
            tensor.to(dtype) for tensor in (x, weight_logits, input_gate, output_gate)
        )
    check_arguments(x, weight_logits, input_gate, output_gate, merge_weight, len(codes), window)
    if merge_weight is None:
        merge_weight = torch.ones(len(codes), dtype=torch.float32, device=x.device)
    run = scan_reference if resolve_backend(backend, x.device) == "reference" else scan_forward
    return run(x, weight_logits, input_gate, output_gate, merge_weight, codes, window or 0)
