"""Counter-based random numbers: every draw is a function of (seed, stream, sample number), and of nothing else.

A sample number is n = step · batch_size + slot in training and the image's index in sampling, so neither batch size,
world size, accumulation nor a restart changes a draw. The generator is Philox (Salmon et al., 2011) as numpy ships
it: the key is (seed, stream), the upper word of the counter is n, the one below it the part of what n draws. Draws
are made on the CPU, the same for every device.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Stream(enum.IntEnum):
    """What a random number is for; a value, once used, never changes its meaning."""

    ORDER = 0
    NOISE = 1
    TIMESTEP = 2
    LABEL_DROPOUT = 3
    STOCHASTIC_DEPTH = 4
    FLIP = 5
    POSTERIOR = 6
    SAMPLE = 7
    SAMPLE_STEP = 8
    SAMPLE_LABEL = 9
    VALIDATION_NOISE = 10
    VALIDATION_TIMESTEP = 11
    VALIDATION_POSTERIOR = 12
    CAPTION = 20
    CROP = 30
    SHIFT = 31
    RANDAUGMENT = 32
    COLOUR = 33
    ERASING = 34
    ERASING_NOISE = 35
    MIXING = 36


def _generators(seed: int, stream: Stream, numbers: Sequence[int], part: int = 0) -> Iterator[np.random.Generator]:
    """Yield the generator of each number; one object whose counter is moved, which is much cheaper than new ones."""
    philox = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
    generator, state = np.random.Generator(philox), philox.state
    for number in numbers:
        state["state"]["counter"][:] = (0, 0, part, number)
        philox.state = state
        yield generator


def normal(seed: int, stream: Stream, numbers: Sequence[int], shape: Sequence[int], part: int = 0) -> Tensor:
    """Return standard normal draws, float32, [len(numbers), *shape]; row i depends on (seed, stream, numbers[i], part).

    `part` counts what one number draws at several times, such as an image's noise at each step of a sampler.
    """
    draws = np.empty((len(numbers), *shape), dtype=np.float32)
    for row, generator in zip(draws, _generators(seed, stream, numbers, part), strict=True):
        row[...] = generator.standard_normal(row.shape, dtype=np.float32)
    return torch.from_numpy(draws)


def uniform(seed: int, stream: Stream, numbers: Sequence[int], shape: Sequence[int] = ()) -> Tensor:
    """Return uniform draws in [0, 1), float64, [len(numbers), *shape]; row i depends on numbers[i] alone."""
    draws = np.empty((len(numbers), *shape))
    for row, generator in enumerate(_generators(seed, stream, numbers)):
        draws[row] = generator.random(tuple(shape))
    return torch.from_numpy(draws)


@functools.lru_cache(maxsize=2)  # a batch can span two epochs
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order in which an epoch visits `size` items, read-only int64 [size]; a function of (seed, epoch)."""
    order = next(_generators(seed, Stream.ORDER, [epoch])).permutation(size)
    order.flags.writeable = False
    return order


def data_indices(
    seed: int, numbers: Sequence[int], size: int, order: Callable[[int], np.ndarray] | None = None
) -> np.ndarray:
    """Return the data set index of each sample number, int64: epoch n // size visits every item once.

    `order` maps an epoch to the order of its items; None for `permutation`.
    """
    epochs, positions = np.divmod(np.asarray(numbers, dtype=np.int64), size)
    indices = np.empty_like(epochs)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        items = permutation(seed, int(epoch), size) if order is None else order(int(epoch))
        indices[chosen] = items[positions[chosen]]
    return indices
