"""What the tests of every scan backend share: inputs, an independent oracle, and the one table of tolerances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gspn_dit.ops import DIRECTIONS, gspn_scan

NAMES = ("x", "weight_logits", "input_gate", "output_gate", "merge_weight")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("contiguous", "permuted", "sliced", "expanded")


class Tolerance(NamedTuple):
    """|actual - expected| ≤ relative·|expected| + absolute·(size of the largest value of the tensor)."""

    relative: float
    absolute: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-14),
    torch.float32: Tolerance(1e-5, 4e-6),
    # Accumulation is in float32, so a 16-bit result is off by its own rounding and no more.
    torch.bfloat16: Tolerance(2**-8, 1e-5),
    torch.float16: Tolerance(2**-11, 1e-5),
}
"""Errors allowed against the float64 reference of the same inputs, by dtype of the tensor that is compared."""


class Inputs(NamedTuple):
    """The tensor arguments of one call of `gspn_scan`."""

    x: Tensor
    weight_logits: Tensor
    input_gate: Tensor
    output_gate: Tensor
    merge_weight: Tensor | None

    def tensors(self) -> list[Tensor]:
        """The tensors that are there, in the order of the arguments."""
        return [tensor for tensor in self if tensor is not None]

    def leaves(self) -> Inputs:
        """The same values and strides as leaves that require a gradient."""
        return Inputs(*(None if t is None else t.detach().requires_grad_() for t in self))

    def wide(self) -> Inputs:
        """The same values as contiguous float64."""
        return Inputs(*(None if t is None else t.detach().to(torch.float64).contiguous() for t in self))


def lay_out(tensor: Tensor, strides: str) -> Tensor:
    """Store a tensor with strides that are not contiguous; "expanded" also makes values repeat."""
    if strides == "contiguous":
        return tensor.contiguous()
    if strides == "permuted":
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if strides == "sliced":
        # Every second element of a larger buffer, at an odd offset; what lies between is NaN.
        buffer = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan, dtype=tensor.dtype)
        view = buffer.to(tensor.device)[..., 1::2]
        return view.copy_(tensor)
    if strides == "expanded":
        # One row of the image (of the last-but-two dimension of a vector: itself) stands for all of them.
        return tensor[:, :1].expand_as(tensor) if tensor.dim() > 1 else tensor[:1].expand_as(tensor)
    raise AssertionError(strides)


def make_inputs(
    shape: tuple[int, int, int, int],
    groups: int | None = None,
    directions: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    strides: str = "contiguous",
    merge: torch.dtype | None = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Inputs:
    """Draw inputs for x of `shape` [B, H, W, C]; `groups` None means C, `merge` None leaves the merge weight out.

    The values depend on the seed and the shapes alone, not on dtype, strides or device.
    """
    batch, height, width, channels = shape
    groups = channels if groups is None else groups
    pixels = (batch, height, width, directions)
    generator = torch.Generator().manual_seed(seed)

    def draw(size: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return lay_out(values.to(device, dtype), strides)

    return Inputs(
        draw(shape, 1.0, dtype),
        draw((*pixels, 3, groups), 2.0, dtype),
        draw((*pixels, channels), 1.0, dtype),
        draw((*pixels, channels), 1.0, dtype),
        None if merge is None else draw((directions,), 1.0, merge),
    )


def naive_scan(inputs: Inputs, directions: Sequence[str] = DIRECTIONS, window: int | None = None) -> Tensor:
    """The scan by its definition, one number at a time in float64: slow, and written apart from `gspn_dit.ops`."""
    x, weight_logits, input_gate, output_gate = (tensor.double().tolist() for tensor in inputs[:4])
    merge = [1.0] * len(directions) if inputs.merge_weight is None else inputs.merge_weight.double().tolist()
    batch, height, width, channels = inputs.x.shape
    groups = inputs.weight_logits.shape[-1]
    y = torch.zeros(inputs.x.shape, dtype=torch.float64)
    for d, direction in enumerate(directions):
        by_column, forward = direction in ("right", "left"), direction in ("right", "down")
        lines, positions = (width, height) if by_column else (height, width)
        for b in range(batch):
            for c in range(channels):
                group = c * groups // channels
                states: dict[tuple[int, int], float] = {}
                for line in range(lines) if forward else reversed(range(lines)):
                    before = line - 1 if forward else line + 1
                    first = before not in range(lines) or (window is not None and before // window != line // window)
                    for n in range(positions):
                        row, column = (n, line) if by_column else (line, n)
                        state = input_gate[b][row][column][d][c] * x[b][row][column][c]
                        if not first:
                            here = [weight_logits[b][row][column][d][k][group] for k in range(3)]
                            state += sum(
                                weight * states[before, n + k] for k, weight in _naive_weights(here, n, positions)
                            )
                        states[line, n] = state
                        y[b, row, column, c] += merge[d] * output_gate[b][row][column][d][c] * state
    return y


def _naive_weights(logits: list[float], n: int, positions: int) -> Iterator[tuple[int, float]]:
    """Yield (k, weight) of the neighbours on the line, from sigmoids divided by their sum."""
    valid = [k for k in (-1, 0, 1) if 0 <= n + k < positions]
    logs = {k: min(logits[k + 1], 0.0) - math.log1p(math.exp(-abs(logits[k + 1]))) for k in valid}
    largest = max(logs.values())
    total = sum(math.exp(log - largest) for log in logs.values())
    for k in valid:
        yield k, math.exp(logs[k] - largest) / total


def scan_and_gradients(
    inputs: Inputs,
    grad_y: Tensor,
    directions: Sequence[str] = DIRECTIONS,
    window: int | None = None,
    backend: str = "reference",
) -> tuple[Tensor, list[Tensor]]:
    """Return y and the gradients of the tensors that are there, for the upstream gradient `grad_y`."""
    leaves = inputs.leaves()
    y = gspn_scan(*leaves, directions=directions, window=window, backend=backend)
    return y.detach(), list(torch.autograd.grad(y, leaves.tensors(), grad_y))


def assert_close(actual: Tensor, expected: Tensor, what: str, size: float = 1.0) -> None:
    """Compare with a float64 expectation under `TOLERANCES[actual.dtype]`; at least `size` counts as the largest."""
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    tolerance = TOLERANCES[actual.dtype]
    wide, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert bool(wide.isfinite().all()), f"{what} is not finite"
    allowed = tolerance.relative * expected.abs() + tolerance.absolute * max(size, float(expected.abs().max()))
    error = (wide - expected).abs()
    worst = float((error / allowed.clamp_min(1e-300)).max())
    assert bool((error <= allowed).all()), f"{what}: error is {worst:.3g} times what {actual.dtype} allows"


def check_against_reference(
    inputs: Inputs, directions: Sequence[str] = DIRECTIONS, window: int | None = None, backend: str = "cpu"
) -> None:
    """Compare y and every gradient of a backend with the float64 reference of the same values; check dtypes too."""
    grad_y = lay_out(torch.cos(torch.arange(inputs.x.numel(), dtype=torch.float64)).reshape(inputs.x.shape), "permuted")
    grad_y = grad_y.to(inputs.x.device, inputs.x.dtype)
    y, gradients = scan_and_gradients(inputs, grad_y, directions, window, backend)
    wide = inputs.wide()
    expected_y, expected = scan_and_gradients(wide, grad_y.double(), directions, window)
    assert y.dtype == inputs.x.dtype
    assert y.is_contiguous()
    assert_close(y, expected_y, "y")
    for name, tensor, gradient, truth in zip(NAMES, inputs.tensors(), gradients, expected, strict=False):
        assert gradient.dtype == tensor.dtype, name
        # The gradient of the merge weight is a sum over the whole image, in which large terms may cancel.
        size = math.sqrt(inputs.x.numel()) if name == "merge_weight" else 1.0
        assert_close(gradient, truth, f"grad_{name}", size)
