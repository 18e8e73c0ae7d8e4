"""Runs the fused kernels of the projected scan on tensors: fills in pointers and strides, calls a launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.plan import alignment_of
from gspn_dit.ops.cuda.projected_backward_plan import plan_backward
from gspn_dit.ops.cuda.projected_plan import FIELDS, ProjectedGeometry, ProjectedPlan, plan_forward
from gspn_dit.ops.cuda.run import readable, token_strides
from gspn_dit.ops.cuda.types import Launcher

_POSITIONS = {}
_LENGTH = 0
for _name, _count in FIELDS:
    _POSITIONS[_name] = slice(_LENGTH, _LENGTH + _count)
    _LENGTH += _count
PROBLEM_BYTES = 8 * _LENGTH

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_TOKENS = ("x", "proxy", "grad_y")
_WEIGHTS = ("logits_weight", "input_gate_weight", "output_gate_weight", "skip_weight")


def _inputs(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], merge_weight: Tensor, skip_weight: Tensor | None
) -> dict[str, Tensor]:
    given = [*weights, *([] if skip_weight is None else [skip_weight])]
    return {
        **{name: readable(tensor.detach()) for name, tensor in zip(_TOKENS, tokens)},
        **{name: weight.detach().contiguous() for name, weight in zip(_WEIGHTS, given)},
        "merge_weight": merge_weight.detach().contiguous(),
    }


def _geometry(inputs: Mapping[str, Tensor], codes: Sequence[int], window: int) -> ProjectedGeometry:
    x, proxy = inputs["x"], inputs["proxy"]
    batch, height, width, channels = x.shape
    read = [tensor for name, tensor in inputs.items() if name != "merge_weight"]
    strides = [stride for name in _TOKENS if name in inputs for stride in token_strides(inputs[name])]
    aligned = alignment_of([t.data_ptr() for t in read], [*strides, channels, proxy.shape[-1]], x.element_size()) >= 4
    groups = len(inputs["logits_weight"]) // (3 * len(codes))
    return ProjectedGeometry(
        *(x.dtype, batch, height, width, channels, groups, proxy.shape[-1], tuple(codes), window),
        vector=4 if aligned else 1,
        skip="skip_weight" in inputs,
    )


def _launch_all(
    todo: ProjectedPlan,
    geometry: ProjectedGeometry,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    launcher: Launcher,
) -> None:
    fields = np.zeros(_LENGTH, dtype=np.int64)
    for name in ("batch", "height", "width", "channels", "groups", "proxy_channels", "window"):
        fields[_POSITIONS[name]] = getattr(geometry, name)
    codes = geometry.codes
    fields[_POSITIONS["directions"]] = len(codes)
    fields[_POSITIONS["code"]] = codes + (0,) * (4 - len(codes))
    fields[_POSITIONS["merge_is_float"]] = inputs["merge_weight"].dtype == torch.float32
    tensors = {**inputs, **outputs}
    for name, tensor in tensors.items():
        fields[_POSITIONS[name]] = tensor.data_ptr()
        if name in _TOKENS:
            fields[_POSITIONS[f"{name}_stride"]] = token_strides(tensor)
    for launch in todo.launches:
        problem = fields.copy()
        for name, value in launch.fields.items():
            problem[_POSITIONS[name]] = value
        launcher(launch, problem.tobytes(), tensors)


def run_projected_forward(
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
    *,
    device: Device,
    launcher: Launcher,
) -> Tensor | str:
    """Compute the projected scan with the fused kernels that `launcher` runs, or say why they do not take it.

    `weights` are those of the logits and the two gates; other arguments as in the operator pair.
    """
    if x.numel() == 0 or proxy.numel() == 0:
        return "there is nothing to compute"
    inputs = _inputs((x, proxy), weights, merge_weight, skip_weight)
    geometry = _geometry(inputs, directions, window)
    todo = plan_forward(geometry, device)
    if isinstance(todo, str):
        return todo
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_all(todo, geometry, inputs, {"y": y}, launcher)
    return y


def run_projected_backward(
    grad_y: Tensor,
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: Sequence[int],
    window: int,
    *,
    device: Device,
    launcher: Launcher,
    cut: tuple[int, int] | None = None,
) -> Gradients | str:
    """Return the gradients of x, proxy, the three weights, the merge weight and the skip weight ([0] without), or say
    why the fused kernels do not take the call; `cut` as in `plan_backward`.
    """
    if x.numel() == 0 or proxy.numel() == 0:
        return "there is nothing to compute"
    inputs = _inputs((x, proxy, grad_y), weights, merge_weight, skip_weight)
    geometry = _geometry(inputs, directions, window)
    todo = plan_backward(geometry, device, cut)
    if isinstance(todo, str):
        return todo
    names = [name for name in inputs if name != "grad_y"]
    outputs = {f"grad_{name}": torch.empty_like(inputs[name], memory_format=torch.contiguous_format) for name in names}
    buffers = {name: torch.empty(length, dtype=torch.float32, device=x.device) for name, length in todo.buffers.items()}
    _launch_all(todo, geometry, inputs, {**outputs, **buffers}, launcher)
    outputs.setdefault("grad_skip_weight", x.new_empty(0))
    grad_x, grad_proxy, *grad_weights = (outputs[f"grad_{name}"] for name in ("x", "proxy", *_WEIGHTS[:3]))
    logits, input_gate, output_gate = grad_weights
    return (
        grad_x,
        grad_proxy,
        logits,
        input_gate,
        output_gate,
        outputs["grad_merge_weight"],
        outputs["grad_skip_weight"],
    )
