"""Statistics of the random streams, sharp enough that a change of `rng.py` cannot pass unseen.

Seeds are fixed, so a result never changes by chance. A sound generator fails a chi-square test with a probability of
`CHANCE`, and a figure lies beyond `SIGMAS` standard deviations with one of 6e-7. The last tests plant faults and demand
that the first ones find them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from gspn_dit import rng
from gspn_dit.rng import Stream

pytestmark = pytest.mark.slow

CHANCE = 1e-6
SIGMAS = 5.0
SEEDS = (0, 1, 2, 3, 2**32, 2**63 - 1)


def assert_uniform(counts: np.ndarray, what: str, probabilities: np.ndarray | None = None, lost: int = 0) -> None:
    """Chi-square of counts against probabilities, equal ones by default; neither too far nor too close.

    `lost` is by how much the degrees of freedom are fewer than one less than the number of counts.
    """
    counts = counts.ravel().astype(np.float64)
    expected = counts.sum() * (np.full(counts.size, 1 / counts.size) if probabilities is None else probabilities)
    assert expected.min() > 10, f"{what}: too few draws"
    value, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1 - lost
    low, high = chi2.ppf(CHANCE, freedom), chi2.ppf(1 - CHANCE, freedom)
    assert low < value < high, f"{what}: chi-square is {value:.1f}, {low:.1f} to {high:.1f} with {freedom} degrees"


def assert_independent(left: np.ndarray, right: np.ndarray, what: str) -> None:
    """Uniform draws side by side: no correlation, and every field of a 12 × 12 board equally often."""
    correlation = float(np.corrcoef(left, right)[0, 1])
    assert abs(correlation) < SIGMAS / math.sqrt(left.size), f"{what}: correlation {correlation:.4f}"
    board, *_ = np.histogram2d(left, right, bins=12, range=((0, 1), (0, 1)))
    assert_uniform(board, what)


def uniform(seed: int, stream: Stream, numbers: Sequence[int], shape: Sequence[int] = ()) -> np.ndarray:
    return rng.uniform(seed, stream, numbers, shape).numpy()


def normal(count: int, stream: Stream = Stream.NOISE) -> torch.Tensor:
    """Draws of 64 numbers, in one row of float32."""
    return rng.normal(0, stream, range(64), [count // 64]).flatten()


# -- uniform draws ---------------------------------------------------------------------------------------------------


def test_uniform_over_values_and_over_numbers() -> None:
    within, over = uniform(0, Stream.NOISE, [7], [1_000_000])[0], uniform(0, Stream.FLIP, range(100_000))
    for values, what in ((within, "one number's values"), (over, "one value of each number")):
        assert_uniform(np.bincount((values * 256).astype(int), minlength=256), what)
        bits = (values * 2**53).astype(np.uint64)
        for bit in range(53):
            ones = int(((bits >> np.uint64(bit)) & np.uint64(1)).sum())
            deviation = abs(ones - values.size / 2) / math.sqrt(values.size / 4)
            assert deviation < SIGMAS, f"{what}: bit {bit} is off by {deviation:.1f} standard deviations"


def test_neighbouring_values_and_numbers_are_independent() -> None:
    row = uniform(0, Stream.NOISE, [7], [200_000])[0]
    numbers = uniform(0, Stream.TIMESTEP, range(50_000))
    for distance in (1, 2, 4, 64, 256):
        assert_independent(row[distance:], row[:-distance], f"values {distance} apart")
        assert_independent(numbers[distance:], numbers[:-distance], f"numbers {distance} apart")
    for bit in range(1, 63, 7):
        far = uniform(0, Stream.TIMESTEP, range(2**bit, 2**bit + 20_000))
        assert_independent(far, numbers[:20_000] if bit > 20 else numbers[-20_000:], f"numbers from 2^{bit} on")


def test_streams_are_independent() -> None:
    draws = {stream: uniform(0, stream, range(20_000)) for stream in Stream}
    for one, other in itertools.combinations(Stream, 2):
        assert_independent(draws[one], draws[other], f"{one.name} and {other.name}")


def test_seeds_are_independent() -> None:
    draws = {seed: uniform(seed, Stream.NOISE, range(20_000)) for seed in SEEDS}
    for one, other in itertools.combinations(SEEDS, 2):
        assert_independent(draws[one], draws[other], f"seeds {one} and {other}")


def test_no_draw_comes_twice() -> None:
    """Of 79,872 draws of 53 bits two are equal with a probability of 4e-7: seed, stream and number never mix."""
    draws = [uniform(seed, stream, range(1024)) for seed in SEEDS for stream in Stream]
    values = np.concatenate(draws)
    assert np.unique(values).size == values.size


# -- normal draws ----------------------------------------------------------------------------------------------------


def assert_normal_moments(values: torch.Tensor) -> None:
    wide, count = values.double(), values.numel()
    deviations = {1: 1.0, 2: math.sqrt(2), 3: math.sqrt(15), 4: math.sqrt(96), 6: math.sqrt(10_170)}
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        moment = float((wide**power).mean())
        allowed = SIGMAS * deviations[power] / math.sqrt(count)
        assert abs(moment - expected) < allowed, f"moment {power} is {moment:.5f}, {expected} ± {allowed:.5f}"


def assert_normal_tails(values: torch.Tensor, threshold_of: Callable[[float], float]) -> None:
    """Count what lies beyond; `threshold_of` says from which exact value on a draw is stored as at least that much."""
    for sign, limit in itertools.product((-1, 1), (2.0, 3.0, 3.5, 4.0, 4.5)):
        found = int((sign * values.double() >= limit).sum())
        expected = values.numel() * norm.sf(threshold_of(limit))
        assert abs(found - expected) < SIGMAS * math.sqrt(expected), (
            f"{found} beyond {sign * limit}, not {expected:.0f}"
        )
    assert 5.0 < float(values.double().abs().max()) < 6.5  # of 16.8 million, 9.6 lie beyond 5


def test_normal_moments_and_tails_in_float32() -> None:
    values = normal(2**24)
    assert_normal_moments(values)
    assert_normal_tails(values, lambda limit: limit)
    places = norm.cdf(values[: 2**22].double().numpy())
    assert_uniform(np.bincount((places * 512).astype(int), minlength=512), "equally probable intervals")


def test_normal_moments_and_tails_in_bfloat16() -> None:
    values = normal(2**24).to(torch.bfloat16)
    assert_normal_moments(values)

    def threshold_of(limit: float) -> float:
        below = float(torch.tensor(limit).to(torch.bfloat16).view(torch.int16).sub(1).view(torch.bfloat16))
        return (below + limit) / 2  # rounded to the nearest; a limit has an even last bit and takes the tie

    assert_normal_tails(values, threshold_of)
    grid = 1 + np.arange(129) / 128  # every bfloat16 from 1 to 2
    edges = np.concatenate([[1 - 1 / 512], (grid[:-1] + grid[1:]) / 2])
    inside = values[(values >= 1) & (values < 2)].double().numpy()
    counts = np.bincount(np.round((inside - 1) * 128).astype(int), minlength=128)
    masses = norm.cdf(edges[1:]) - norm.cdf(edges[:-1])
    assert_uniform(counts, "values of bfloat16 from 1 to 2", masses / masses.sum())


def test_normal_draws_of_neighbours_are_independent() -> None:
    rows = rng.normal(0, Stream.SAMPLE, range(20_000), [4]).double().numpy()
    other = rng.normal(1, Stream.SAMPLE, range(20_000), [4]).double().numpy()
    places, others = norm.cdf(rows), norm.cdf(other)
    assert_independent(places[1:, 0], places[:-1, 0], "neighbouring numbers")
    assert_independent(places[:, 0], places[:, 1], "neighbouring values")
    assert_independent(places[:, 0], others[:, 0], "neighbouring seeds")
    part = norm.cdf(rng.normal(0, Stream.SAMPLE, range(20_000), [4], part=1).double().numpy())
    assert_independent(places[:, 0], part[:, 0], "parts of a number's draws")
    assert_independent(places[1:, 0], part[:-1, 0], "a number and the next one's part")
    # Squares as well: draws made in pairs or from shared tables betray themselves by their size.
    sizes = np.abs(2 * places - 1)
    assert_independent(sizes[1:, 0], sizes[:-1, 0], "sizes of neighbouring numbers")
    assert_independent(sizes[:, 0], sizes[:, 1], "sizes of neighbouring values")


# -- permutations ----------------------------------------------------------------------------------------------------


def test_permutations_are_uniform() -> None:
    orders = [tuple(rng.permutation(0, epoch, 4).tolist()) for epoch in range(24_000)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert_uniform(np.array(counts), "all orders of 4 items")
    long = np.stack([rng.permutation(1, epoch, 12) for epoch in range(20_000)])
    table = np.stack([np.bincount(place, minlength=12) for place in long.T])
    assert_uniform(table, "items by places", lost=2 * 12 - 2)  # rows and columns sum to the number of epochs
    for shift, what in ((1, "next epoch"), (7, "seventh next")):
        board = np.zeros((12, 12))
        np.add.at(board, (long[shift:, 0], long[:-shift, 0]), 1)
        assert_uniform(board, f"first items of an epoch and the {what}")


# -- planted faults --------------------------------------------------------------------------------------------------


def faulty_generators(
    change: Callable[[int, int, int], tuple[int, int, int]],
) -> Callable[..., Iterator[np.random.Generator]]:
    """What `rng` draws from, with (seed, stream, number) changed first."""
    original = rng._generators

    def generators(seed: int, stream: Stream, numbers: Sequence[int], part: int = 0) -> Iterator[np.random.Generator]:
        for number in numbers:
            one, two, three = change(int(seed), int(stream), int(number))
            yield from original(one, two, [three], part)  # type: ignore[arg-type]

    return generators


FAULTS: dict[str, tuple[Callable[[int, int, int], tuple[int, int, int]], Callable[[], None]]] = {
    "one stream for all": (lambda seed, stream, number: (seed, 0, number), test_streams_are_independent),
    "seed and number mixed": (lambda seed, stream, number: (0, stream, seed ^ number), test_no_draw_comes_twice),
    "seed and stream mixed": (lambda seed, stream, number: (0, seed + stream, number), test_no_draw_comes_twice),
    "seeds of 32 bits": (lambda seed, stream, number: (seed % 2**32, stream, number), test_seeds_are_independent),
    "numbers in pairs": (
        lambda seed, stream, number: (seed, stream, number // 2),
        test_neighbouring_values_and_numbers_are_independent,
    ),
    "few numbers": (
        lambda seed, stream, number: (seed, stream, number % 5000),
        test_uniform_over_values_and_over_numbers,
    ),
    "few epochs": (lambda seed, stream, number: (seed, stream, number % 100), test_permutations_are_uniform),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_counter_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, check = FAULTS[fault]
    monkeypatch.setattr(rng, "_generators", faulty_generators(change))
    rng.permutation.cache_clear()
    with pytest.raises(AssertionError):
        check()
    rng.permutation.cache_clear()


NORMAL_FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tails cut at 4.4": lambda values: values.clamp(-4.4, 4.4),
    "tails folded at 3.8": lambda values: torch.where(values.abs() > 3.8, values / 2, values),
    "a mean of 0.2%": lambda values: values + 0.002,
    "too wide by 0.2%": lambda values: values * 1.002,
}


@pytest.mark.parametrize("fault", NORMAL_FAULTS)
@pytest.mark.parametrize("check", [test_normal_moments_and_tails_in_float32, test_normal_moments_and_tails_in_bfloat16])
def test_a_fault_of_the_normal_draws_is_found(
    fault: str, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rng.normal

    def faulty(*arguments: Any) -> torch.Tensor:
        return NORMAL_FAULTS[fault](original(*arguments))

    monkeypatch.setattr(rng, "normal", faulty)
    with pytest.raises(AssertionError):
        check()


def test_a_biased_shuffle_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapping each item with any other, not with a later one, is the classic mistake."""

    def naive(seed: int, epoch: int, size: int) -> np.ndarray:
        order, generator = np.arange(size), np.random.default_rng([seed, epoch])
        for place, other in enumerate(generator.integers(size, size=size)):
            order[place], order[other] = order[other], order[place]
        return order

    monkeypatch.setattr(rng, "permutation", naive)
    with pytest.raises(AssertionError):
        test_permutations_are_uniform()
