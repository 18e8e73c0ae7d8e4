"""Runs a plan of launches on tensors: fills in pointers and strides, allocates with torch, calls a launcher."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gspn_dit.ops.contract import compute_dtype
from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.plan import alignment_of, plan
from gspn_dit.ops.cuda.types import FIELDS, Geometry, Launcher, Plan

_POSITIONS = {}
_LENGTH = 0
for _name, _count in FIELDS:
    _POSITIONS[_name] = slice(_LENGTH, _LENGTH + _count)
    _LENGTH += _count
PROBLEM_BYTES = 8 * _LENGTH


def readable(tensor: Tensor) -> Tensor:
    """The tensor with its channels side by side, copied only where they are not."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def token_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the channels; a dimension of size 1 has none."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]))


def _geometry(inputs: dict[str, Tensor], codes: Sequence[int], window: int) -> Geometry:
    x = inputs["x"]
    batch, height, width, channels = x.shape
    vectors = [tensor for name, tensor in inputs.items() if name != "merge_weight"]
    strides = [stride for tensor in vectors for stride in token_strides(tensor)]
    alignment = alignment_of([tensor.data_ptr() for tensor in vectors], strides, x.element_size())
    return Geometry(
        x.dtype, batch, height, width, channels, inputs["weight_logits"].shape[-1], tuple(codes), window, alignment
    )


def _call_fields(inputs: dict[str, Tensor], geometry: Geometry) -> np.ndarray:
    """The fields of `gspn::Problem` that are the same in every launch of a call."""
    fields = np.zeros(_LENGTH, dtype=np.int64)
    for name in ("batch", "height", "width", "channels", "groups", "window"):
        fields[_POSITIONS[name]] = getattr(geometry, name)
    codes = geometry.codes
    fields[_POSITIONS["directions"]] = len(codes)
    fields[_POSITIONS["code"]] = codes + (0,) * (4 - len(codes))
    fields[_POSITIONS["merge_is_float"]] = inputs["merge_weight"].dtype == torch.float32
    for name, tensor in inputs.items():
        fields[_POSITIONS[name]] = tensor.data_ptr()
        if name != "merge_weight":
            fields[_POSITIONS[f"{name}_stride"]] = token_strides(tensor)
    return fields


def _launch_all(
    todo: Plan, geometry: Geometry, inputs: dict[str, Tensor], outputs: dict[str, Tensor], launcher: Launcher
) -> None:
    fields = _call_fields(inputs, geometry)
    for name, tensor in outputs.items():
        fields[_POSITIONS[name]] = tensor.data_ptr()
    tensors = {**inputs, **outputs}
    for launch in todo.launches:
        problem = fields.copy()
        for name, value in launch.fields.items():
            problem[_POSITIONS[name]] = value
        launcher(launch, problem.tobytes(), tensors)


def _buffers(todo: Plan, x: Tensor, result: Tensor) -> dict[str, Tensor]:
    """Workspaces of a plan. Sums over directions of float32 and float64 lie in the result itself."""
    dtype = compute_dtype(x.dtype)
    buffers = {name: torch.empty(length, dtype=dtype, device=x.device) for name, length in todo.buffers.items()}
    if "merge_sums" in buffers:
        buffers["merge_sums"].zero_()  # launches of one plan may differ in their number of blocks
    if todo.regime in ("wide", "long"):
        buffers.setdefault("sums", result)
    return buffers


def run_forward(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
    *,
    device: Device,
    launcher: Launcher,
    regime: str | None = None,
) -> Tensor:
    """Compute the scan with the kernels that `launcher` runs; arguments as in the operator pair."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    tokens = {"x": x, "weight_logits": weight_logits, "input_gate": input_gate, "output_gate": output_gate}
    inputs = {name: readable(tensor.detach()) for name, tensor in tokens.items()}
    inputs["merge_weight"] = merge_weight.detach().contiguous()
    geometry = _geometry(inputs, directions, window)
    todo = plan(geometry, device, False, regime)
    _launch_all(todo, geometry, inputs, {"y": y, **_buffers(todo, x, y)}, launcher)
    return y


def run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor,
    directions: Sequence[int],
    window: int,
    *,
    device: Device,
    launcher: Launcher,
    regime: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the five inputs with the kernels that `launcher` runs, each like its input."""
    like = (x, weight_logits, input_gate, output_gate, merge_weight)
    if x.numel() == 0:
        grad_x, *others = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in like)
        return grad_x, others[0], others[1], others[2], others[3]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    tokens = {
        "x": x,
        "weight_logits": weight_logits,
        "input_gate": input_gate,
        "output_gate": output_gate,
        "grad_y": grad_y,
    }
    inputs = {name: readable(tensor.detach()) for name, tensor in tokens.items()}
    inputs["merge_weight"] = merge_weight.detach().contiguous()
    geometry = _geometry(inputs, directions, window)
    todo = plan(geometry, device, True, regime)
    names = ("grad_x", "grad_weight_logits", "grad_input_gate", "grad_output_gate", "grad_merge_weight")
    outputs = {**dict(zip(names, grads)), **_buffers(todo, x, grads[0])}
    _launch_all(todo, geometry, inputs, outputs, launcher)
    return grads[0], grads[1], grads[2], grads[3], grads[4]
