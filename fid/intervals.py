"""95 % intervals of the scores, computed from one sample set.

Scores that are means over images, splits or subsets are bootstrapped. A Fréchet distance is not: a resample with
replacement holds 63 % of the images, and the distance grows as images become fewer, so the bootstrap is biased
upwards. Its interval comes from the delete-a-group jackknife, whose replicas all have the same number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fid.moments import Gaussian, Moments, merged

LEVEL = 0.95
RESAMPLES = 2000
STUDENT_T_9 = 2.2621571627  # 97.5 % quantile with 9 degrees of freedom, for 10 groups
JACKKNIFE = "delete-a-group jackknife, 10 random groups of the samples, t with 9 degrees of freedom; reference fixed"
BOOTSTRAP = f"percentile bootstrap, {RESAMPLES} resamples of the {{}}"


def jackknife(groups: Sequence[Moments], reference: Gaussian, value: float) -> dict[str, float | str]:
    """The interval of a Fréchet distance from the moments of the samples' 10 groups (about `value`, never below 0)."""
    assert len(groups) == 10, "the quantile is that of 10 groups"
    replicas = [
        reference.frechet_distance(Gaussian.fit(merged(groups[:left] + groups[left + 1 :])))
        for groups in [list(groups)]
        for left in range(len(groups))
    ]
    centre = sum(replicas) / len(replicas)
    share = (len(replicas) - 1) / len(replicas)
    error = math.sqrt(share * sum((replica - centre) ** 2 for replica in replicas))
    half = STUDENT_T_9 * error
    return {"low": max(0.0, value - half), "high": value + half, "level": LEVEL, "method": JACKKNIFE}


def bootstrap(values: np.ndarray, what: str, size: int | None = None, seed: int = 0) -> dict[str, float | str]:
    """The interval of the mean of `values`, [n], by resampling them.

    For 0 and 1 alone the resampled number of ones is binomial, which is drawn directly.

    Args:
        values: what the mean is of.
        what: what they are one of each, in words.
        size: values per resample, fewer than n where they are not independent: as many as would be.
    """
    values = np.asarray(values, dtype=np.float64)
    size = len(values) if size is None else size
    generator = np.random.default_rng(seed)
    if np.isin(values, (0, 1)).all():
        means = generator.binomial(size, values.mean(), RESAMPLES) / size
    else:
        means = values[generator.integers(0, len(values), (RESAMPLES, size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high), "level": LEVEL, "method": BOOTSTRAP.format(what)}
