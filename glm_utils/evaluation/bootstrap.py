"""Differences between two models on the same examples, with intervals: what chance alone would move them by.

Source: paired bootstrap, Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CHUNK = 100  # resamples at once, which bounds the memory
PERCENTILES = (2.5, 97.5)
NORMAL_QUANTILE = 1.96  # of the same probability


@dataclass(frozen=True)
class Difference:
    """A figure of two models.

    Attributes:
        before: The first model's.
        after: The second model's.
        low: Lower end of the 95 % interval of after - before; NaN with a single example, as nothing can be resampled.
        high: Its upper end.
        num_examples: How many examples had a part in it.
    """

    before: float
    after: float
    low: float
    high: float
    num_examples: int

    @property
    def change(self) -> float:
        """After - before."""
        return self.after - self.before

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class LeftOut:
    """A figure of all answers together.

    Attributes:
        value: The figure.
        left_out: Its values without each of the answers, [N].
    """

    value: float
    left_out: np.ndarray


def compare_sums(
    before: np.ndarray, after: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray], seed: int
) -> Difference:
    """Compare a figure that follows from sums over the examples.

    Args:
        before: [N, K], a row per example.
        after: The same of the second model.
        reduce: Figure of sums [..., K].
        seed: Seed of the resampling; the same for every figure, so that they move together.
    """
    random = np.random.default_rng(seed)
    changes = []
    for _ in range(NUM_RESAMPLES // CHUNK):
        drawn = random.integers(len(before), size=(CHUNK, len(before)))
        changes.append(reduce(after[drawn].sum(axis=1)) - reduce(before[drawn].sum(axis=1)))
    found = np.concatenate(changes)
    found = found[~np.isnan(found)]  # a resample may hold no example that counts
    num_examples = num_counted(before, after)
    low, high = np.percentile(found, PERCENTILES) if num_examples > 1 else (np.nan, np.nan)
    old, new = (float(reduce(rows.sum(axis=0))) for rows in (before, after))
    return Difference(old, new, float(low), float(high), num_examples)


def num_counted(before: np.ndarray, after: np.ndarray) -> int:
    """Return how many examples have a part in a figure: those with a row other than 0."""
    return int((np.hstack((before, after)) != 0).any(axis=1).sum())


def compare_left_out(before: LeftOut, after: LeftOut) -> Difference:
    """Compare a figure that is no function of sums, with the jackknife's interval.

    A resample holds examples twice, which makes any count of different things too small.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 11.

    Args:
        before: The first model's figure.
        after: The second model's.
    """
    left_out = after.left_out - before.left_out
    num_examples = len(left_out)
    variance = (num_examples - 1) / num_examples * ((left_out - left_out.mean()) ** 2).sum()
    change, margin = after.value - before.value, NORMAL_QUANTILE * float(np.sqrt(variance))
    return Difference(before.value, after.value, change - margin, change + margin, num_examples)
