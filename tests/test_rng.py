"""Random numbers: functions of (seed, stream, number) and of nothing else, with the distributions they claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gspn_dit.rng import Stream, data_indices, normal, permutation, uniform

Draw = Callable[[int, Stream, Sequence[int], Sequence[int]], Tensor]

DRAWS = pytest.mark.parametrize("draw", [normal, uniform], ids=["normal", "uniform"])
numbers = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5)


# -- pinned values: a change of these changes every training and every set of samples --------------------------------


def test_streams_keep_their_values() -> None:
    assert {stream.name: stream.value for stream in Stream} == {
        "ORDER": 0,
        "NOISE": 1,
        "TIMESTEP": 2,
        "LABEL_DROPOUT": 3,
        "STOCHASTIC_DEPTH": 4,
        "FLIP": 5,
        "POSTERIOR": 6,
        "SAMPLE": 7,
        "SAMPLE_STEP": 8,
        "SAMPLE_LABEL": 9,
        "VALIDATION_NOISE": 10,
        "VALIDATION_TIMESTEP": 11,
        "VALIDATION_POSTERIOR": 12,
        "CAPTION": 20,
        "CROP": 30,
        "SHIFT": 31,
        "RANDAUGMENT": 32,
        "COLOUR": 33,
        "ERASING": 34,
        "ERASING_NOISE": 35,
        "MIXING": 36,
    }


def test_golden_normal() -> None:
    expected = [[-1.431463, 1.6707169, -0.40272397], [-1.2998049, -0.28623706, -2.27102]]
    torch.testing.assert_close(normal(0, Stream.NOISE, [0, 1], [3]), torch.tensor(expected))


def test_golden_uniform() -> None:
    assert uniform(0, Stream.TIMESTEP, [0, 1, 2]).tolist() == [
        0.8144335776159864,
        0.6011704838564642,
        0.7564414223170919,
    ]
    assert uniform(2**63 - 1, Stream.FLIP, [2**63 - 1], [2]).tolist() == [[0.8599491479037156, 0.6515692879943622]]


def test_golden_permutation() -> None:
    assert permutation(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert permutation(0, 1, 10).tolist() == [3, 2, 9, 7, 1, 5, 0, 4, 8, 6]
    assert permutation(1, 0, 10).tolist() == [6, 0, 7, 9, 4, 1, 8, 5, 2, 3]


def test_uniform_is_philox_as_published() -> None:
    """Salmon et al. (2011), Philox 4×64 with 10 rounds, written out; the counter of number n starts at (1, 0, 0, n)."""
    mask = 2**64 - 1

    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [
                second >> 64 ^ counter[1] ^ key[0],
                second & mask,
                first >> 64 ^ counter[3] ^ key[1],
                first & mask,
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        return counter

    words = philox([1, 0, 0, 6], [5, Stream.FLIP]) + philox([2, 0, 0, 6], [5, Stream.FLIP])
    expected = [(word >> 11) / 2**53 for word in words]
    assert uniform(5, Stream.FLIP, [6], [8])[0].tolist() == expected


# -- what a draw depends on ------------------------------------------------------------------------------------------


@DRAWS
@given(seed=st.integers(0, 2**63 - 1), chosen=numbers)
def test_a_row_depends_on_its_number_alone(draw: Draw, seed: int, chosen: list[int]) -> None:
    together = draw(seed, Stream.NOISE, chosen, [2, 3])
    assert together.shape == (len(chosen), 2, 3)
    for row, number in zip(together, chosen, strict=True):
        assert torch.equal(row, draw(seed, Stream.NOISE, [number], [2, 3])[0])
    backwards = draw(seed, Stream.NOISE, chosen[::-1], [2, 3])
    assert torch.equal(backwards, together.flip(0))


@DRAWS
def test_calls_in_between_change_nothing(draw: Draw) -> None:
    before = draw(3, Stream.NOISE, [5], [7])
    draw(4, Stream.NOISE, [5], [1])
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(draw(3, Stream.NOISE, [5], [7]), before)


@DRAWS
def test_an_odd_number_of_values_leaves_nothing_behind_for_the_next_row(draw: Draw) -> None:
    # A generator that makes values in pairs could keep one.
    rows = draw(0, Stream.NOISE, [8, 9, 10], [1])
    assert torch.equal(rows[1], draw(0, Stream.NOISE, [9], [1])[0])


@DRAWS
def test_a_longer_row_continues_a_shorter_one(draw: Draw) -> None:
    assert torch.equal(draw(0, Stream.NOISE, [4], [100])[:, :10], draw(0, Stream.NOISE, [4], [10]))


@DRAWS
def test_seeds_streams_and_numbers_all_make_a_difference(draw: Draw) -> None:
    rows = [
        draw(seed, stream, [number], [4])[0]
        for seed in (0, 1, 2**32, 2**63 - 1)
        for stream in Stream
        for number in (0, 1, 2**32, 2**63 - 1)
    ]
    values = torch.stack(rows).double()
    assert len(values.unique(dim=0)) == len(rows)
    assert len(values.flatten().unique()) == values.numel()  # rows do not overlap shifted by a value either


@DRAWS
def test_takes_ranges_and_arrays_and_no_numbers(draw: Draw) -> None:
    expected = draw(0, Stream.NOISE, [2, 3, 4], [2])
    assert torch.equal(draw(0, Stream.NOISE, range(2, 5), [2]), expected)
    assert torch.equal(draw(0, Stream.NOISE, np.arange(2, 5), [2]), expected)
    assert draw(0, Stream.NOISE, [], [2]).shape == (0, 2)


# -- distributions ---------------------------------------------------------------------------------------------------


def test_normal_moments_over_numbers_and_within_a_row() -> None:
    for values in (normal(0, Stream.NOISE, range(10_000), [1]), normal(0, Stream.NOISE, [0], [10_000])):
        values = values.flatten().double()
        assert abs(values.mean()) < 4 / math.sqrt(10_000)
        assert abs(values.var() - 1) < 4 * math.sqrt(2 / 10_000)
        assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / 10_000)


def test_uniform_fills_its_interval_evenly() -> None:
    values = uniform(0, Stream.TIMESTEP, range(10_000))
    assert 0 <= values.min() < 0.001 and 0.999 < values.max() < 1
    counts = torch.histc(values, 10, 0, 1)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 27.9  # 99.9% of chi-squared with 9 degrees of freedom


@DRAWS
def test_neighbours_are_uncorrelated(draw: Draw) -> None:
    rows = draw(0, Stream.NOISE, range(4000), [1]).flatten().double()
    other_stream = draw(0, Stream.TIMESTEP, range(4000), [1]).flatten().double()
    other_seed = draw(1, Stream.NOISE, range(4000), [1]).flatten().double()
    for left, right in ((rows[1:], rows[:-1]), (rows, other_stream), (rows, other_seed)):
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4 / math.sqrt(4000)


def test_dtypes() -> None:
    assert normal(0, Stream.NOISE, [0], [2]).dtype == torch.float32
    assert uniform(0, Stream.NOISE, [0]).dtype == torch.float64
    assert uniform(0, Stream.NOISE, [0, 1]).shape == (2,)


# -- data order ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40), size=st.integers(1, 50))
def test_permutation_holds_every_item_once(seed: int, epoch: int, size: int) -> None:
    assert sorted(permutation(seed, epoch, size).tolist()) == list(range(size))


def test_permutation_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 5)[0] = 3


def test_permutations_are_unbiased() -> None:
    """Each item comes first equally often: 3,000 epochs of 6 items, 500 expected each."""
    first = np.bincount([permutation(0, epoch, 6)[0] for epoch in range(3000)], minlength=6)
    assert ((first - 500) ** 2 / 500).sum() < 20.5  # 99.9% of chi-squared with 5 degrees of freedom


@given(seed=st.integers(0, 2**32), size=st.integers(1, 12), batch=st.integers(1, 9))
def test_epoch_visits_everything_once_whatever_the_batch(seed: int, size: int, batch: int) -> None:
    epochs = 3
    visited = np.concatenate(
        [
            data_indices(seed, range(start, min(start + batch, epochs * size)), size)
            for start in range(0, epochs * size, batch)
        ]
    )
    for epoch in range(epochs):
        part = visited[epoch * size : (epoch + 1) * size]
        assert sorted(part.tolist()) == list(range(size))
        assert part.tolist() == permutation(seed, epoch, size).tolist()


def test_indices_across_an_epoch_boundary() -> None:
    first, second = permutation(7, 0, 10), permutation(7, 1, 10)
    assert first.tolist() != second.tolist()
    assert data_indices(7, range(8, 13), 10).tolist() == [first[8], first[9], second[0], second[1], second[2]]
    assert data_indices(7, [12, 8], 10).tolist() == [second[2], first[8]]


def test_indices_far_into_a_training() -> None:
    number = 400_000 * 256 + 17
    expected = permutation(0, number // 1000, 1000)[number % 1000]
    assert data_indices(0, [number], 1000).tolist() == [expected]
    assert data_indices(0, [number], 1000).dtype == np.int64
