"""The scans' operators in terms of PyTorch's own, for programs that leave PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gspn_dit.ops  # noqa: F401  (registers the operators)
from gspn_dit.ops.materialised import projected_forward
from gspn_dit.ops.reference import scan_reference


def scan_decompositions() -> dict[Any, Callable[..., Tensor]]:
    """Return what `torch.export.ExportedProgram.run_decompositions` takes to replace every scan by PyTorch's operators.

        program = torch.export.export(model.eval(), (images,)).run_decompositions(scan_decompositions())
        torch.onnx.export(program, (images,), dynamo=True).save("model.onnx")

    The result is `reference`'s, step by step: some 20 operators for each line of the image and direction, so the height
    and width of what is scanned are fixed then. The number of images may stay open.
    """
    operators = torch.ops.gspn_dit
    return {
        operators.scan_forward.default: scan_reference,
        operators.projected_scan_forward.default: _projected_scan,
    }


def _projected_scan(
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
    weights = (logits_weight, input_gate_weight, output_gate_weight)
    return projected_forward(scan_reference, x, proxy, weights, merge_weight, skip_weight, directions, window)
