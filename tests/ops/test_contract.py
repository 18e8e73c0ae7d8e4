"""What the scan refuses, and which implementation it picks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspn_dit.ops import BackendUnavailableError, backends, gspn_scan
from gspn_dit.ops.cuda import binding as cuda
from tests.ops.scan_cases import Inputs, make_inputs

BACKENDS = ("reference", "cpu")


def change(**tensors: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    """Return a function that replaces the named tensors of the inputs by functions of them."""
    return lambda inputs: inputs._replace(**{name: f(getattr(inputs, name)) for name, f in tensors.items()})


BROKEN_TENSORS: dict[str, tuple[Callable[[Inputs], Inputs], list[str]]] = {
    "x has three dimensions": (change(x=lambda t: t[0]), ["x must be [B, H, W, C]", "[3, 5, 4]"]),
    "input gate, channels": (
        change(input_gate=lambda t: t[..., :3]),
        ["input_gate", "[2, 3, 5, 4, 3]", "[2, 3, 5, 4]", "[2, 3, 5, 4, 4]"],
    ),
    "output gate, height": (
        change(output_gate=lambda t: t[:, :2]),
        ["output_gate", "[2, 2, 5, 4, 4]", "[2, 3, 5, 4]", "[2, 3, 5, 4, 4]"],
    ),
    "output gate, broadcast": (
        change(output_gate=lambda t: t[:1]),
        ["output_gate", "[1, 3, 5, 4, 4]", "[2, 3, 5, 4, 4]"],
    ),
    "logits, directions": (
        change(weight_logits=lambda t: t[:, :, :, :3]),
        ["weight_logits", "[2, 3, 5, 3, 3, 2]", "4 directions", "[2, 3, 5, 4, 3, 'G']"],
    ),
    "logits, neighbours": (change(weight_logits=lambda t: t[..., :2, :]), ["[2, 3, 5, 4, 2, 2]", "'G'"]),
    "logits, five dimensions": (change(weight_logits=lambda t: t[..., 0]), ["[2, 3, 5, 4, 3]", "'G'"]),
    "groups that do not divide": (
        change(weight_logits=lambda t: torch.cat([t, t[..., :1]], -1)),
        ["3 groups", "4 channels"],
    ),
    "no groups": (change(weight_logits=lambda t: t[..., :0]), ["0 groups", "4 channels"]),
    "more groups than channels": (change(weight_logits=lambda t: t.repeat(1, 1, 1, 1, 1, 4)), ["8 groups", "4 chan"]),
    "integer tokens": (change(x=lambda t: t.long()), ["x has dtype torch.int64", "torch.float32", "torch.bfloat16"]),
    "logits, dtype": (
        change(weight_logits=lambda t: t.double()),
        ["weight_logits has dtype torch.float64", "x has torch.float32"],
    ),
    "input gate, dtype": (change(input_gate=lambda t: t.half()), ["input_gate", "torch.float16", "torch.float32"]),
    "output gate, dtype": (change(output_gate=lambda t: t.bfloat16()), ["output_gate", "torch.bfloat16", "float32"]),
    "merge weight, dtype": (
        change(merge_weight=lambda t: t.double()),
        ["merge_weight has dtype torch.float64", "torch.float32"],
    ),
    "merge weight, shape": (change(merge_weight=lambda t: t[:3]), ["merge_weight", "[3]", "4 directions", "[4]"]),
    "merge weight, scalar": (change(merge_weight=lambda t: t[0]), ["merge_weight", "[]", "[4]"]),
    "logits, device": (change(weight_logits=lambda t: t.to("meta")), ["weight_logits is on meta", "x is on cpu"]),
    "gate, device": (change(input_gate=lambda t: t.to("meta")), ["input_gate is on meta", "x is on cpu"]),
    "merge weight, device": (change(merge_weight=lambda t: t.to("meta")), ["merge_weight is on meta", "is on cpu"]),
    "x, device": (change(x=lambda t: t.to("meta")), ["weight_logits is on cpu", "x is on meta"]),
}
BROKEN_OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no direction": ({"directions": ()}, ["directions is empty", "right, left, down, up"]),
    "a direction twice": ({"directions": ("right", "left", "down", "right")}, ["twice", "('right', 'left', 'down'"]),
    "an unknown direction": ({"directions": ("right", "left", "down", "diagonal")}, ["'diagonal'", "left, down, up"]),
    "a string": ({"directions": "right"}, ["sequence of names", "'right'"]),
    "two directions": ({"directions": ("right", "up")}, ["2 directions", "[2, 3, 5, 4, 4]", "[2, 3, 5, 2, 4]"]),
    "window 0": ({"window": 0}, ["window", "None or an int of at least 1", "got 0"]),
    "window -2": ({"window": -2}, ["window", "got -2"]),
    "window True": ({"window": True}, ["window", "got True"]),
    "window 2.0": ({"window": 2.0}, ["window", "got 2.0"]),
    "window '2'": ({"window": "2"}, ["window", "got '2'"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("broken", "fragments"), BROKEN_TENSORS.values(), ids=BROKEN_TENSORS)
def test_mismatched_tensors(backend: str, broken: Callable[[Inputs], Inputs], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        gspn_scan(*broken(make_inputs((2, 3, 5, 4), 2)), backend=backend)
    assert not [fragment for fragment in fragments if fragment not in str(error.value)], str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("options", "fragments"), BROKEN_OPTIONS.values(), ids=BROKEN_OPTIONS)
def test_bad_options(backend: str, options: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        gspn_scan(*make_inputs((2, 3, 5, 4), 2), **options, backend=backend)
    assert not [fragment for fragment in fragments if fragment not in str(error.value)], str(error.value)


def test_a_16_bit_merge_weight_must_be_like_x() -> None:
    inputs = make_inputs((1, 2, 2, 2), dtype=torch.bfloat16, merge=torch.float16)
    with pytest.raises(ValueError, match=r"merge_weight has dtype torch\.float16.*float32 or x's torch\.bfloat16"):
        gspn_scan(*inputs)


class Recorder(TorchDispatchMode):
    """Notes which of the project's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "gspn_dit":
            self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


def operators_called(backend: str) -> list[str]:
    """Names of the project's operators in a forward and a backward pass on the CPU."""
    leaves = make_inputs((1, 3, 3, 2)).leaves()
    with Recorder() as recorder:
        gspn_scan(*leaves, backend=backend).sum().backward()
    return recorder.names


KERNELS = ["gspn_dit::scan_forward", "gspn_dit::scan_backward"]


@pytest.mark.parametrize(
    ("backend", "override", "expected"),
    [
        ("auto", None, KERNELS),
        ("cpu", None, KERNELS),
        ("reference", None, []),
        ("auto", "auto", KERNELS),
        ("auto", "cpu", KERNELS),
        ("auto", "reference", []),
        ("cpu", "reference", KERNELS),
        ("reference", "cpu", []),
    ],
)
def test_which_implementation_runs(
    monkeypatch: pytest.MonkeyPatch, backend: str, override: str | None, expected: list[str]
) -> None:
    """The variable stands in for "auto" alone and forces either implementation."""
    if override is not None:
        monkeypatch.setenv(backends.OVERRIDE_VARIABLE, override)
    assert operators_called(backend) == expected


def test_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((1, 2, 2, 2))
    with pytest.raises(ValueError, match="unknown backend 'cuda'; allowed are auto, reference, cpu, cupy"):
        gspn_scan(*inputs, backend="cuda")
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "triton")
    with pytest.raises(ValueError, match="unknown backend 'triton'"):
        gspn_scan(*inputs)


def test_a_backend_of_another_device() -> None:
    with pytest.raises(ValueError, match="backend 'cupy' needs CUDA tensors, but x is on cpu"):
        gspn_scan(*make_inputs((1, 2, 2, 2)), backend="cupy")
    with pytest.raises(ValueError, match="backend 'cpu' needs CPU tensors, but x is on cuda:0"):
        backends.resolve_backend("cpu", torch.device("cuda:0"))


@pytest.fixture
def no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that CuPy is missing, and forget what has been warned about."""
    monkeypatch.setattr(cuda, "problem", lambda: "CuPy is not installed: pip install -e '.[cuda13]'")
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


def test_a_named_backend_that_cannot_run_says_why(no_cuda_kernels: None) -> None:
    message = re.escape("backend 'cupy' cannot run: CuPy is not installed: pip install -e '.[cuda13]'")
    with pytest.raises(BackendUnavailableError, match=message):
        backends.resolve_backend("cupy", torch.device("cuda"))


def test_falling_back_is_said_once(no_cuda_kernels: None) -> None:
    with pytest.warns(RuntimeWarning, match="falls back to the slow PyTorch reference: CuPy is not installed"):
        assert backends.resolve_backend("auto", torch.device("cuda")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve_backend("auto", torch.device("cuda")) == "reference"


def test_cuda_tensors_take_the_operator_where_cupy_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: None)
    for backend in ("auto", "cupy"):
        assert backends.resolve_backend(backend, torch.device("cuda")) == "operator"
