"""The CPU kernels of every instruction set that this machine has: close to the reference, bit for bit like themselves.

Shapes are chosen from the number of channels that each set computes at a time, so that its tails are seen everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.cpu import binding as cpu
from tests.ops.scan_cases import DTYPES, Inputs, check_against_reference, make_inputs, scan_and_gradients

VECTOR_BYTES = {"pytorch": 64, "baseline": 16, "avx2": 32, "avx512": 64}


AVAILABLE = [name for name in cpu.available_kernels() if name != "amx"]  # which has none of its own for this scan
ALL_KERNELS = pytest.mark.parametrize("kernels", AVAILABLE, indirect=True)
"""For the core of the suite; the rest of it is quick with the kernels that run by default alone."""


@pytest.fixture(
    params=[*(pytest.param(name, marks=pytest.mark.slow) for name in AVAILABLE[:-1]), AVAILABLE[-1]], autouse=True
)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each of the kernels that this machine has."""
    monkeypatch.setenv(cpu.KERNELS_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def channels_at_a_time(kernels: str, dtype: torch.dtype) -> int:
    """Two vectors of the accumulation dtype."""
    return 2 * VECTOR_BYTES[kernels] // (8 if dtype == torch.float64 else 4)


def run(inputs: Inputs, directions: tuple[str, ...] = DIRECTIONS, window: int | None = None) -> list[Tensor]:
    grad_y = torch.cos(torch.arange(inputs.x.numel(), dtype=torch.float32)).view(inputs.x.shape).to(inputs.x.dtype)
    y, gradients = scan_and_gradients(inputs, grad_y, directions, window, "cpu")
    return [y, *gradients]


CASES = [
    # shape, groups, directions, window, strides
    ((1, 1, 1, 1), None, DIRECTIONS, None, "contiguous"),
    ((2, 1, 9, 33), None, DIRECTIONS, None, "contiguous"),
    ((1, 9, 1, 31), None, DIRECTIONS, 4, "permuted"),
    ((3, 5, 7, 16), None, ("up", "left"), None, "sliced"),
    ((1, 7, 5, 52), None, ("left",), 2, "expanded"),
    ((2, 6, 8, 130), None, ("down", "right", "up"), 3, "contiguous"),
    ((2, 6, 5, 48), 3, DIRECTIONS, None, "contiguous"),
    ((1, 4, 6, 34), 2, DIRECTIONS, 2, "permuted"),
    ((2, 3, 4, 24), 12, ("right", "up"), None, "expanded"),
    ((1, 3, 2, 1536), 1, DIRECTIONS, None, "contiguous"),
    ((1, 2, 3, 2100), 2, ("left", "down"), 2, "sliced"),
    ((1, 3, 4, 600), None, DIRECTIONS, None, "contiguous"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'x'.join(map(str, case[0]))}-{case[1]}-{case[3]}-{case[4]}")
def test_odd_shapes(case: tuple, dtype: torch.dtype) -> None:
    shape, groups, directions, window, strides = case
    merge = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs(shape, groups, len(directions), dtype, strides=strides, merge=merge, seed=len(directions))
    check_against_reference(inputs, directions, window, backend="cpu")


@ALL_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_of_a_tail(kernels: str, dtype: torch.dtype) -> None:
    unit, merge = channels_at_a_time(kernels, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    for channels in (unit // 2, unit - 1, unit, unit + 1, 2 * unit - 1, 3 * unit + 1):
        check_against_reference(make_inputs((1, 3, 4, channels), dtype=dtype, merge=merge), backend="cpu")
        shared = make_inputs((1, 3, 4, 2 * channels), 2, dtype=dtype, merge=merge)
        check_against_reference(shared, window=2, backend="cpu")


# -- bits ------------------------------------------------------------------------------------------------------------


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for value, same in zip(actual, expected, strict=True):
        assert torch.equal(value, same)


def part_of(values: list[Tensor], samples: slice = slice(None), channels: slice = slice(None)) -> list[Tensor]:
    """Cut [B, ..., C] tensors; the merge weight, or its gradient, stays whole."""
    return [value[samples, ..., channels] if value.dim() > 1 else value for value in values]


@ALL_KERNELS
@pytest.mark.parametrize("shape", [(6, 5), (1, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_channel_has_the_same_bits_wherever_vectors_end(kernels: str, dtype: torch.dtype, shape: tuple) -> None:
    unit = channels_at_a_time(kernels, dtype)
    inputs = make_inputs((1, *shape, 3 * unit + 3), dtype=dtype)
    whole = run(inputs)
    for channels in (slice(1, 2), slice(0, unit + 1), slice(unit - 1, None), slice(unit // 2, 3 * unit)):
        alone = Inputs(*part_of(list(inputs.tensors()), channels=channels))
        grad_y = torch.cos(torch.arange(inputs.x.numel(), dtype=torch.float32)).view(inputs.x.shape).to(dtype)
        y, gradients = scan_and_gradients(alone, grad_y[..., channels], backend="cpu")
        assert_same_bits([y, *gradients[:4]], part_of(whole, channels=channels)[:5])


@ALL_KERNELS
@pytest.mark.parametrize("directions", [DIRECTIONS, ("up", "right", "left"), ("down", "left")], ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_has_the_same_bits_in_any_batch(dtype: torch.dtype, directions: tuple[str, ...]) -> None:
    inputs = make_inputs((3, 6, 5, 40), 8, len(directions), dtype=dtype)
    grad_y = torch.cos(torch.arange(inputs.x.numel(), dtype=torch.float32)).view(inputs.x.shape).to(dtype)
    y, gradients = scan_and_gradients(inputs, grad_y, directions, backend="cpu")
    for samples in (slice(0, 1), slice(2, 3), slice(1, 3)):
        alone = Inputs(*part_of(list(inputs.tensors()), samples=samples))
        one, its_gradients = scan_and_gradients(alone, grad_y[samples], directions, backend="cpu")
        assert_same_bits([one, *its_gradients[:4]], part_of([y, *gradients[:4]], samples=samples))


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((2, 6, 7, 200), None, torch.float32), ((2, 5, 4, 96), 4, torch.float64), ((1, 9, 7, 200), 25, torch.bfloat16)],
)
def test_results_do_not_depend_on_the_blocks(
    shape: tuple, groups: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(shape, groups, dtype=dtype)
    expected = run(inputs)
    for block in (16, 48, 128):
        monkeypatch.setattr(cpu, "BLOCK", block)
        assert_same_bits(run(inputs), expected)


@ALL_KERNELS
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((1, 9, 7, 200), None, torch.float32),
        ((1, 8, 8, 96), None, torch.float32),
        ((1, 9, 7, 600), None, torch.float32),
        ((1, 5, 6, 200), None, torch.bfloat16),
        ((3, 6, 5, 72), None, torch.float16),
        ((1, 6, 5, 1536), 1, torch.float32),
        ((2, 5, 4, 96), 4, torch.float64),
    ],
)
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_threads(shape: tuple, groups: int | None, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, groups, dtype=dtype)
    torch.set_num_threads(1)
    expected = run(inputs)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert_same_bits(run(inputs), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("groups", (None, 2))
def test_gradients_that_go_past_the_caches(
    dtype: torch.dtype, groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs((2, 4, 5, 704), groups, dtype=dtype)
    if cpu.chosen_kernels() == "pytorch":
        pytest.skip("these leave caches to torch")
    cached = run(inputs)
    monkeypatch.setattr(cpu, "STREAM_BYTES", 0)
    check_against_reference(inputs, backend="cpu")
    assert_same_bits(run(inputs), cached)


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [(-120.0,), (120.0,), (-120.0, 120.0), (-3e38, 3e38), (-3e38,), (-17.0, -40.0, 20.0)]
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_extreme_logits(values: tuple[float, ...], dtype: torch.dtype) -> None:
    merge = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs((1, 6, 5, 40), dtype=dtype, merge=merge)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(values), inputs.weight_logits.shape, generator=generator)
    inputs = inputs._replace(weight_logits=torch.tensor(values, dtype=torch.float64)[chosen].to(dtype))
    check_against_reference(inputs, backend="cpu")


@pytest.mark.parametrize("shift", (0.0, 15.9, 60.0, 1000.0))
def test_equal_differences_below_zero_give_equal_weights(shift: float) -> None:
    """Far below zero a weight depends on differences of logits alone; near the switch nothing jumps."""
    inputs = make_inputs((1, 5, 5, 24))
    logits = inputs.weight_logits.clamp(-3, 3)
    far = inputs._replace(weight_logits=logits - 40.0 - shift)
    expected = gspn_scan(*far.wide(), backend="reference")
    assert torch.allclose(gspn_scan(*far, backend="cpu").double(), expected, rtol=1e-4, atol=2e-4)


def test_nan_and_infinity_go_where_the_reference_sends_them() -> None:
    for value in (math.nan, math.inf):
        for name in ("x", "weight_logits", "input_gate", "output_gate"):
            if name == "weight_logits" and value == math.inf:
                continue  # an infinite logit is outside of the contract
            inputs = make_inputs((1, 5, 6, 20))
            getattr(inputs, name)[:, 2, 3, ..., 7] = value
            grad_y = torch.ones_like(inputs.x)
            ours, theirs = (scan_and_gradients(inputs, grad_y, backend=which) for which in ("cpu", "reference"))
            for mine, truth in zip((ours[0], *ours[1]), (theirs[0], *theirs[1])):
                assert torch.equal(mine.isfinite(), truth.isfinite()), (name, value)
            assert torch.equal(ours[0].isnan(), theirs[0].isnan()), (name, value)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_nan_survives_half_precision_storage(dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 3, 3, 16), dtype=dtype)
    bits = torch.tensor([0x7FFF], dtype=torch.int32).to(torch.int16)  # all ones: rounding up would overflow it
    inputs.x[0, 1, 1] = bits.view(dtype)
    assert gspn_scan(*inputs, backend="cpu")[0, 1, 1].isnan().all()


@pytest.mark.parametrize("groups", (20, 4))
def test_unused_logits_reach_nothing(groups: int) -> None:
    clean = make_inputs((2, 6, 5, 20), groups, directions=1)
    dirty = clean._replace(weight_logits=clean.weight_logits.clone())
    first_lines = [0, 2, 4]  # "down", window 2
    dirty.weight_logits[:, first_lines] = math.nan
    dirty.weight_logits[:, :, 0, :, 0] = math.nan
    dirty.weight_logits[:, :, -1, :, 2] = math.inf
    for mine, truth in zip(run(dirty, ("down",), 2), run(clean, ("down",), 2)):
        assert torch.equal(mine, truth)
    gradient = run(dirty, ("down",), 2)[2]
    assert (gradient[:, first_lines] == 0).all()
    assert (gradient[:, :, 0, :, 0] == 0).all()
    assert (gradient[:, :, -1, :, 2] == 0).all()
