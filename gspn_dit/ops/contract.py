"""What a call of the scan must look like: names of directions, shapes, dtypes and devices of the arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

DIRECTIONS = ("right", "left", "down", "up")
"""The directions in the order of their integer codes; "right" reads columns from column 0 on."""

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def direction_codes(directions: Sequence[str]) -> list[int]:
    """Return the integer code of each direction; raise ValueError for none, unknown or repeated ones."""
    if isinstance(directions, str):
        raise ValueError(f"directions must be a sequence of names, got the string {directions!r}")
    unknown = [name for name in directions if name not in DIRECTIONS]
    if unknown:
        raise ValueError(f"unknown direction {unknown[0]!r}; allowed are {', '.join(DIRECTIONS)}")
    if not directions:
        raise ValueError(f"directions is empty; give at least one of {', '.join(DIRECTIONS)}")
    if len(set(directions)) != len(directions):
        raise ValueError(f"a direction is given twice in {tuple(directions)}")
    return [DIRECTIONS.index(name) for name in directions]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that recurrence and sums accumulate in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which nothing is cast; a device without autocast needs none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that an active autocast region asks for, or None outside of one."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def check_arguments(
    x: Tensor,
    weight_logits: Tensor,
    input_gate: Tensor,
    output_gate: Tensor,
    merge_weight: Tensor | None,
    directions: int,
    window: int | None,
) -> None:
    """Raise ValueError, naming both sides, where shapes, dtypes, devices or the window break the contract.

    `directions` is the number of directions D.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, W, C], got shape {list(x.shape)}")
    batch, height, width, channels = x.shape
    gate_shape = (batch, height, width, directions, channels)
    for name, gate in (("input_gate", input_gate), ("output_gate", output_gate)):
        if tuple(gate.shape) != gate_shape:
            raise ValueError(
                f"{name} has shape {list(gate.shape)}, but x {list(x.shape)} and {directions} directions "
                f"ask for {list(gate_shape)}"
            )
    logits_shape = tuple(weight_logits.shape)
    if len(logits_shape) != 6 or logits_shape[:5] != (batch, height, width, directions, 3):
        raise ValueError(
            f"weight_logits has shape {list(logits_shape)}, but x {list(x.shape)} and {directions} directions "
            f"ask for {[batch, height, width, directions, 3, 'G']}"
        )
    groups = logits_shape[5]
    if channels != groups and (groups < 1 or channels % groups != 0):
        raise ValueError(f"weight_logits has {groups} groups, which must divide the {channels} channels of x")
    _check_dtypes_and_devices(x, weight_logits, input_gate, output_gate, merge_weight)
    if merge_weight is not None and tuple(merge_weight.shape) != (directions,):
        raise ValueError(
            f"merge_weight has shape {list(merge_weight.shape)}, but {directions} directions ask for [{directions}]"
        )
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an int of at least 1, got {window!r}")


def check_projection(
    x: Tensor,
    proxy: Tensor,
    weights: Sequence[Tensor],
    merge_weight: Tensor,
    skip_weight: Tensor | None,
    directions: int,
    window: int | None,
) -> None:
    """Raise ValueError, naming both sides, where a call of `gspn_scan_from_proxy` breaks the contract.

    `weights` are those of the logits and of the two gates.
    """
    if proxy.dim() != 4:
        raise ValueError(f"proxy must be [B, H, W, P], got shape {list(proxy.shape)}")
    width = proxy.shape[3]
    named = dict(zip(("logits_weight", "input_gate_weight", "output_gate_weight"), weights))
    for name, weight in {**named, **({} if skip_weight is None else {"skip_weight": skip_weight})}.items():
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"{name} has shape {list(weight.shape)}, but a proxy of {width} asks for [rows, {width}]")
        if weight.dtype != proxy.dtype:
            raise ValueError(f"{name} has dtype {weight.dtype}, but proxy has {proxy.dtype}")
        if weight.device != proxy.device:
            raise ValueError(f"{name} is on {weight.device}, but proxy is on {proxy.device}")
    if skip_weight is not None and x.dim() == 4 and len(skip_weight) != x.shape[3]:
        raise ValueError(f"skip_weight has {len(skip_weight)} rows, but x {list(x.shape)} asks for one per channel")
    sizes = []
    for name, each in zip(named, ((directions, 3), (directions,), (directions,))):
        rows, parts = len(named[name]), math.prod(each)
        if rows % parts:
            raise ValueError(f"{name} has {rows} rows, which {directions} directions ask to be a multiple of {parts}")
        sizes.append((*proxy.shape[:3], *each, rows // parts))
    # What the weights project to, without its memory.
    logits, input_gate, output_gate = (proxy.detach().new_empty(()).expand(size) for size in sizes)
    check_arguments(x, logits, input_gate, output_gate, merge_weight, directions, window)


def _check_dtypes_and_devices(
    x: Tensor, weight_logits: Tensor, input_gate: Tensor, output_gate: Tensor, merge_weight: Tensor | None
) -> None:
    if x.dtype not in STORAGE_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in STORAGE_DTYPES)
        raise ValueError(f"x has dtype {x.dtype}; the scan takes {allowed}")
    named = {"weight_logits": weight_logits, "input_gate": input_gate, "output_gate": output_gate}
    for name, tensor in named.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but x has {x.dtype}")
    if merge_weight is not None:
        named["merge_weight"] = merge_weight
        if merge_weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"merge_weight has dtype {merge_weight.dtype}, but must be torch.float32 or x's {x.dtype}")
    for name, tensor in named.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
