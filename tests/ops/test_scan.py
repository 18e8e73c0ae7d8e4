"""The values of the scan: hand-computed cases, the naive oracle, stability, symmetries, unused entries, windows."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from gspn_dit.ops import DIRECTIONS, gspn_scan
from tests.ops.scan_cases import (
    DTYPES,
    STRIDES,
    Inputs,
    assert_close,
    check_against_reference,
    make_inputs,
    naive_scan,
    scan_and_gradients,
)

WINDOWS = (None, 1, 2, 3, 4, 7)


def one_direction(x: list[list[float]], **other: list[list[float]]) -> Inputs:
    """Float64 inputs for an [H][W] image of one channel and one direction; gates default to 1, logits to 0.

    `weight_logits` is [H][W][3], `input_gate` and `output_gate` are [H][W].
    """
    image = torch.tensor(x, dtype=torch.float64)
    height, width = image.shape
    weight_logits = torch.tensor(other["weight_logits"]) if "weight_logits" in other else torch.zeros(height, width, 3)
    gates = [torch.tensor(other[name]) if name in other else torch.ones(height, width) for name in GATES]
    return Inputs(
        image[None, :, :, None],
        weight_logits.double()[None, :, :, None, :, None],
        *(gate.double()[None, :, :, None, None] for gate in gates),
        None,
    )


GATES = ("input_gate", "output_gate")
L1, L2, L3 = math.log(1 / 3), 0.0, math.log(3)  # sigmoids 1/4, 1/2, 3/4


@pytest.mark.parametrize(
    ("direction", "expected"),
    # Positions of a one-row image are alone on their column: all the weight goes to k = 0, so h is a running sum of
    # input_gate·x = 1, 1, 6; output_gate is 1, -1, 2. Going down or up, each is on a first line.
    [("right", [1.0, -2.0, 16.0]), ("left", [8.0, -7.0, 12.0]), ("down", [1.0, -1.0, 12.0]), ("up", [1.0, -1.0, 12.0])],
)
def test_one_row_by_hand(backend: str, direction: str, expected: list[float]) -> None:
    inputs = one_direction([[1.0, 2.0, 3.0]], input_gate=[[1.0, 0.5, 2.0]], output_gate=[[1.0, -1.0, 2.0]])
    y = gspn_scan(*inputs, directions=(direction,), backend=backend)
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_three_neighbours_by_hand(backend: str) -> None:
    """Down a 2×3 image: weights are those of the row that is computed, neighbours off the line do not count."""
    unused = [9.0, -9.0, 9.0]
    inputs = one_direction(
        [[6.0, 12.0, 18.0], [0.5, 100.0, 0.0]],
        weight_logits=[[unused] * 3, [[9.0, L3, L1], [L3, L2, L1], [L1, L1, 9.0]]],
    )
    y = gspn_scan(*inputs, directions=("down",), backend=backend)
    below = [
        0.75 * 6 + 0.25 * 12 + 0.5,  # 3/4 and 1/4 sum to 1
        6 / 2 + 12 / 3 + 18 / 6 + 100,  # 3/4, 1/2, 1/4 over 3/2
        12 / 2 + 18 / 2,  # 1/4 and 1/4 over 1/2
    ]
    torch.testing.assert_close(y[0, :, :, 0], torch.tensor([[6.0, 12.0, 18.0], below], dtype=torch.float64))


def test_neighbours_are_absolute_when_scanning_backwards(backend: str) -> None:
    """Left through a 3×2 image: index 0 is still the smaller row, and column 1 comes before column 0."""
    far = 60.0  # sigmoid 1 against 1e-26: all the weight on one neighbour
    inputs = one_direction(
        [[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]],
        weight_logits=[[[0.0, -far, far], [0.0] * 3], [[far, -far, -far], [0.0] * 3], [[-far, far, 0.0], [0.0] * 3]],
    )
    y = gspn_scan(*inputs, directions=("left",), backend=backend)
    expected = [[2.0, 1.0], [1.0, 2.0], [4.0, 4.0]]
    torch.testing.assert_close(y[0, :, :, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("direction", "expected"),
    # Segments are [0, 2), [2, 4), [4]: the short one is the last of the image also for a scan to the left.
    [("right", [1.0, 2.0, 1.0, 2.0, 1.0]), ("left", [2.0, 1.0, 2.0, 1.0, 1.0])],
)
def test_a_window_that_does_not_divide_by_hand(backend: str, direction: str, expected: list[float]) -> None:
    y = gspn_scan(*one_direction([[1.0] * 5]), directions=(direction,), window=2, backend=backend)
    assert y.flatten().tolist() == expected


def test_groups_and_merge_by_hand(backend: str) -> None:
    """Channels 0 and 1 use group 0, channels 2 and 3 group 1; directions are weighted and added."""
    x = torch.tensor([[8.0, 8.0, 8.0, 8.0], [4.0, 4.0, 4.0, 4.0]]).repeat(2, 1, 1)[None]  # rows equal, columns 8 and 4
    x[0, 1] *= 2
    logits = torch.zeros(1, 2, 2, 2, 3, 2)
    logits[0, :, :, :, 0, 0] = logits[0, :, :, :, 2, 0] = L3
    ones = torch.ones(1, 2, 2, 2, 4)
    y = gspn_scan(x, logits, ones, ones, torch.tensor([1.0, 10.0]), directions=("right", "down"), backend=backend)
    # Row 0, column 1 to the right: own column has weight 1/2 (group 1) or .5/(.5 + .75) = 2/5 (group 0).
    right = torch.tensor([[[8.0] * 4, [16.8, 16.8, 16.0, 16.0]], [[16.0] * 4, [19.2, 19.2, 20.0, 20.0]]])
    down = torch.tensor([[[8.0] * 4, [4.0] * 4], [[21.6, 21.6, 22.0, 22.0], [14.4, 14.4, 14.0, 14.0]]])
    torch.testing.assert_close(y[0], right + 10 * down)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_the_definition(backend: str, window: int | None, groups: int) -> None:
    inputs = make_inputs((2, 4, 5, 4), groups, dtype=torch.float64)
    y = gspn_scan(*inputs, window=window, backend=backend)
    assert_close(y, naive_scan(inputs, window=window), "y")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 5, 3), (2, 5, 1, 3), (1, 2, 2, 1), (1, 3, 17, 2)])
@pytest.mark.parametrize("window", [None, 2])
def test_thin_images(backend: str, shape: tuple[int, int, int, int], window: int | None) -> None:
    inputs = make_inputs(shape, dtype=torch.float64)
    assert_close(gspn_scan(*inputs, window=window, backend=backend), naive_scan(inputs, window=window), "y")
    check_against_reference(inputs, window=window, backend=backend)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 3, 4, 0), (0, 3, 4, 0), (0, 1, 1, 1)])
def test_empty_batch_or_channels(backend: str, shape: tuple[int, int, int, int]) -> None:
    inputs = make_inputs(shape, groups=2 if shape[-1] == 0 else None)
    y, gradients = scan_and_gradients(inputs, torch.ones(shape), backend=backend)
    assert y.shape == shape
    for tensor, gradient in zip(inputs.tensors(), gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("logit", ["random", 0.0, 120.0, -120.0, 3e38, -3e38])
def test_propagation_rows_sum_to_one(backend: str, direction: str, logit: str | float) -> None:
    """Batch entry j starts in unit state j, so that the second line of the result is column j of the matrix."""
    positions = 6
    height, width = (positions, 2) if direction in ("right", "left") else (2, positions)
    inputs = make_inputs((positions, height, width, 2), 1, directions=1, merge=None)
    logits = inputs.weight_logits[:1] if logit == "random" else torch.full_like(inputs.weight_logits[:1], float(logit))
    first, second = (0, 1) if direction in ("right", "down") else (1, 0)
    by_line = torch.zeros(positions, 2, positions, 2)
    by_line[:, first] = torch.eye(positions)[:, :, None]
    x = by_line.transpose(1, 2) if direction in ("right", "left") else by_line
    ones = torch.ones_like(inputs.input_gate)
    y = gspn_scan(x, logits.expand_as(inputs.weight_logits), ones, ones, directions=(direction,), backend=backend)
    y = y.transpose(1, 2) if direction in ("right", "left") else y
    torch.testing.assert_close(y[:, first, :, 0], torch.eye(positions))
    matrix = y[:, second, :, 0].T
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(positions))
    assert torch.equal(matrix, matrix.triu(-1).tril(1))


LARGEST = {torch.float64: 1e308, torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 65504.0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [120.0, None])
def test_extreme_logits_stay_finite(backend: str, dtype: torch.dtype, magnitude: float | None) -> None:
    """Every mixture of the two signs, three times the smallest included, for y and all gradients."""
    inputs = make_inputs((2, 4, 5, 2), dtype=dtype)
    largest = LARGEST[dtype] if magnitude is None else magnitude
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)  # [8, 3]
    picked = signs[torch.arange(2 * 4 * 5 * 4 * 2) % 8].reshape(2, 4, 5, 4, 2, 3).transpose(-1, -2)
    inputs = inputs._replace(weight_logits=(picked * largest).to(dtype))
    check_against_reference(inputs, backend=backend)
    assert_close(gspn_scan(*inputs, backend=backend), naive_scan(inputs), "y")


def unused_entries(inputs: Inputs, directions: tuple[str, ...], window: int | None) -> Tensor:
    """True where a weight logit is not used: its neighbour is off the line or its line is first in a segment."""
    _, height, width, _ = inputs.x.shape
    unused = torch.zeros(inputs.weight_logits.shape, dtype=torch.bool)
    for d, direction in enumerate(directions):
        lines, view = (
            (width, unused.transpose(1, 2)) if direction in ("right", "left") else (height, unused)
        )  # [B, lines, positions, D, 3, G]
        view[:, :, 0, d, 0] = True
        view[:, :, -1, d, 2] = True
        for line in range(lines):
            before = line - 1 if direction in ("right", "down") else line + 1
            if not 0 <= before < lines or (window and before // window != line // window):
                view[:, line, :, d] = True
    return unused


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (1, 1, 6, 2), (1, 6, 1, 2)])
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_unused_entries_reach_nothing(
    backend: str, window: int | None, shape: tuple[int, int, int, int], filler: float
) -> None:
    inputs = make_inputs(shape, 2)
    unused = unused_entries(inputs, DIRECTIONS, window)
    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    poisoned, clean = (
        scan_and_gradients(
            inputs._replace(weight_logits=inputs.weight_logits.masked_fill(unused, value)),
            grad_y,
            window=window,
            backend=backend,
        )
        for value in (filler, 0.0)
    )
    assert bool((poisoned[1][1][unused] == 0).all())
    assert torch.equal(poisoned[0], clean[0])
    for gradient, expected in zip(poisoned[1], clean[1], strict=True):
        assert torch.equal(gradient, expected)
        assert bool(gradient.isfinite().all())


def flipped(inputs: Inputs, dim: int) -> Inputs:
    """All tensors of the mirrored image."""
    return Inputs(*(t if t is None or t.dim() == 1 else t.flip(dim) for t in inputs))


def swapped(inputs: Inputs) -> Inputs:
    """The same inputs with the weights of k = -1 and k = +1 exchanged."""
    return inputs._replace(weight_logits=inputs.weight_logits.flip(4))


MIRRORED = {"right": "left", "left": "right", "down": "up", "up": "down"}
TRANSPOSED = {"right": "down", "down": "right", "left": "up", "up": "left"}


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_opposite_direction_is_the_flipped_scan_of_the_flipped_image(
    backend: str, direction: str, window: int | None
) -> None:
    inputs = make_inputs((2, 4, 6, 4), 2, directions=1, dtype=torch.float64)
    dim = 2 if direction in ("right", "left") else 1
    y = gspn_scan(*inputs, directions=(direction,), window=window, backend=backend)
    mirrored = gspn_scan(*flipped(inputs, dim), directions=(MIRRORED[direction],), window=window, backend=backend)
    assert_close(mirrored.flip(dim), y, "y")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_flip_along_the_line_swaps_the_neighbours(backend: str, direction: str, window: int | None) -> None:
    inputs = make_inputs((2, 4, 5, 4), 2, directions=1, dtype=torch.float64)
    dim = 1 if direction in ("right", "left") else 2
    y = gspn_scan(*inputs, directions=(direction,), window=window, backend=backend)
    again = gspn_scan(*swapped(flipped(inputs, dim)), directions=(direction,), window=window, backend=backend)
    assert_close(again.flip(dim), y, "y")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_are_transposed_columns(backend: str, direction: str, window: int | None) -> None:
    inputs = make_inputs((2, 4, 5, 4), 2, directions=1, dtype=torch.float64)
    transposed = Inputs(*(t if t is None or t.dim() == 1 else t.transpose(1, 2) for t in inputs))
    y = gspn_scan(*inputs, directions=(direction,), window=window, backend=backend)
    again = gspn_scan(*transposed, directions=(TRANSPOSED[direction],), window=window, backend=backend)
    assert_close(again.transpose(1, 2), y, "y")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 6])
def test_segments_are_scans_of_their_own(backend: str, direction: str, window: int) -> None:
    """A windowed scan is the global scans of the pieces [0, s), [s, 2s), …, the last one shorter."""
    inputs = make_inputs((2, 5, 5, 4), 2, directions=1, dtype=torch.float64)
    dim = 2 if direction in ("right", "left") else 1
    pieces = [
        gspn_scan(
            *(t if t is None or t.dim() == 1 else t.narrow(dim, start, min(window, 5 - start)) for t in inputs),
            directions=(direction,),
            backend=backend,
        )
        for start in range(0, 5, window)
    ]
    y = gspn_scan(*inputs, directions=(direction,), window=window, backend=backend)
    assert_close(y, torch.cat(pieces, dim), "y")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, tuple[str, ...], int | None]:
    """Inputs, directions and window of any legal call, small."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = st.integers(1, 7)
    shape = (draw(st.integers(0, 3)), draw(size), draw(size), groups * per_group)
    directions = tuple(draw(st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4, unique=True)))
    dtype = draw(st.sampled_from(DTYPES))
    inputs = make_inputs(
        shape,
        groups,
        len(directions),
        dtype,
        strides=draw(st.sampled_from(STRIDES)),
        merge=draw(st.sampled_from((None, torch.float32, dtype))),
        seed=draw(st.integers(0, 100)),
    )
    # Each tensor may have strides of its own.
    others = make_inputs(shape, groups, len(directions), dtype, strides=draw(st.sampled_from(STRIDES)), merge=None)
    inputs = inputs._replace(x=others.x, output_gate=others.output_gate)
    return inputs, directions, draw(st.none() | st.integers(1, 8))


@hypothesis.given(call=calls())
def test_any_call_equals_the_reference(backend: str, call: tuple[Inputs, tuple[str, ...], int | None]) -> None:
    """Forward and all gradients, whatever the shape, groups, directions, window, dtypes and strides."""
    check_against_reference(*call, backend=backend)


@hypothesis.given(call=calls())
@hypothesis.settings(max_examples=15)
def test_any_call_equals_the_definition(backend: str, call: tuple[Inputs, tuple[str, ...], int | None]) -> None:
    inputs, directions, window = call
    y = gspn_scan(*inputs, directions=directions, window=window, backend=backend)
    assert_close(y, naive_scan(inputs, directions, window), "y")
