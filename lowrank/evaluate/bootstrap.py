"""Confidence intervals of metrics: percentile bootstrap over the rows, paired where two adapters are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank.evaluate.metrics import Metric

_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A value and where it lies in 95 of 100 resamples of the rows."""

    value: float
    low: float
    high: float


def interval(metric: Metric, seed: int = 0) -> Interval:
    """Of one metric."""
    return _interval(metric.value, _resampled(metric, seed))


def difference(metric: Metric, other: Metric, seed: int = 0) -> Interval:
    """`metric` less `other`, on the same resamples of the same rows (Koehn 2004, paired bootstrap)."""
    assert len(metric.statistics_NK) == len(other.statistics_NK), "the rows are the same"
    return _interval(metric.value - other.value, _resampled(metric, seed) - _resampled(other, seed))


def _resampled(metric: Metric, seed: int) -> np.ndarray:
    rows = len(metric.statistics_NK)
    chosen = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES)
    return np.asarray([metric.combine(sums, rows) for sums in chosen @ metric.statistics_NK])


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
