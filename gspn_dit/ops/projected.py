"""The scan behind its linear maps, whose logits and gates are not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspn_dit.ops.backends import resolve_backend
from gspn_dit.ops.contract import DIRECTIONS, autocast_dtype, check_projection, direction_codes, without_autocast
from gspn_dit.ops.forward_mode import carries_tangent, scan_forward
from gspn_dit.ops.materialised import projected_forward
from gspn_dit.ops.projected_operator import projected_scan_forward
from gspn_dit.ops.reference import scan_reference


def gspn_scan_from_proxy(
    x: Tensor,
    proxy: Tensor,
    logits_weight: Tensor,
    input_gate_weight: Tensor,
    output_gate_weight: Tensor,
    merge_weight: Tensor,
    skip_weight: Tensor | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `gspn_scan` with logits and gates that are linear maps of a narrow proxy of the tokens.

    The logits and gates (20 values per token and channel for four directions) dwarf every other activation. Fused
    kernels hold them in registers alone, in the backward pass too, which computes them again.

    Args:
        x: tokens [B, H, W, C].
        proxy: [B, H, W, P].
        logits_weight: [D·3·G, P], the map to `weight_logits`.
        input_gate_weight: [D·C, P], the map to `input_gate`.
        output_gate_weight: [D·C, P], the map to `output_gate`.
        merge_weight: [D].
        skip_weight: [C, P] adds (skip_weight·proxy) ⊙ x to the result. A skip D_d of each direction is the same
            function, with the sum of merge_weight[d]·D_d.
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
        skip_weight = None if skip_weight is None else skip_weight.to(dtype)
    check_projection(x, proxy, weights, merge_weight, skip_weight, len(codes), window)
    with without_autocast(x.device.type):
        reference = resolve_backend(backend, x.device) == "reference"
        forward_mode = carries_tangent(x, proxy, *weights, merge_weight, skip_weight)
        if not reference and not forward_mode:
            return projected_scan_forward(x, proxy, *weights, merge_weight, skip_weight, codes, window or 0)
        scan = scan_reference if reference else scan_forward

        def run(x: Tensor, proxy: Tensor, merge_weight: Tensor, skip_weight: Tensor | None, *weights: Tensor) -> Tensor:
            return projected_forward(scan, x, proxy, weights, merge_weight, skip_weight, codes, window or 0)

        if forward_mode or not torch.is_grad_enabled():  # a checkpoint would refuse the former
            return run(x, proxy, merge_weight, skip_weight, *weights)
        y = checkpoint(run, x, proxy, merge_weight, skip_weight, *weights, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y
