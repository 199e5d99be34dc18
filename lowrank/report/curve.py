"""A loss curve in bounded memory, and its smooth course."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


class Curve:
    """The losses of a job as at most `limit` points, each the mean of `bucket` consecutive steps.

    Once there are more, neighbors are merged and the bucket doubles, so a run of any length costs the
    same, and a curve restored from `state` goes on exactly as if it had never stopped. Losses that are
    not finite count in no mean; a bucket with nothing else is NaN.
    """

    def __init__(self, limit: int = 1024) -> None:
        assert limit >= 2
        self._limit = limit
        self._bucket = 1
        self._points: list[list[float]] = []  # last step, sum of finite losses, finite losses, all losses

    def add(self, step: int, loss: float) -> None:
        """The loss (nats per token) of optimizer step `step`."""
        if not self._points or self._points[-1][3] >= self._bucket:
            if len(self._points) >= self._limit:
                self._merge()
            self._points.append([step, 0.0, 0, 0])
        point = self._points[-1]
        point[0] = step
        point[3] += 1
        if math.isfinite(loss):
            point[1] += loss
            point[2] += 1

    def _merge(self) -> None:
        pairs = [self._points[index : index + 2] for index in range(0, len(self._points), 2)]
        self._points = [[pair[-1][0], *(sum(point[key] for point in pair) for key in (1, 2, 3))] for pair in pairs]
        self._bucket *= 2

    def points(self) -> tuple[list[int], list[float]]:
        """`(steps, losses)`, ascending; a step is the last of its bucket."""
        steps = [int(point[0]) for point in self._points]
        return steps, [point[1] / point[2] if point[2] else math.nan for point in self._points]

    def state(self) -> dict[str, Any]:
        """What `restore` needs; goes through JSON."""
        return {"limit": self._limit, "bucket": self._bucket, "points": [list(point) for point in self._points]}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Curve:
        """The curve whose `state` this is."""
        curve = cls(state["limit"])
        curve._bucket = state["bucket"]
        curve._points = [list(point) for point in state["points"]]
        return curve


def smooth(losses: Sequence[float] | np.ndarray, width: float | None = None) -> np.ndarray:
    """The course of a curve under its noise: a local straight line around each point, Gaussian weights.

    Unlike a moving average it neither lags behind the curve nor bends much at its ends. `width` is the
    standard deviation of the weights in points; left out, 3 % of the curve, at least 1. Points that
    are not finite have no weight; where nothing is near, the result is NaN.
    """
    y_N = np.asarray(losses, dtype=np.float64)
    if len(y_N) < 3:
        return y_N.copy()
    width = max(1.0, 0.03 * len(y_N)) if width is None else width
    reach = min(len(y_N) - 1, math.ceil(3 * width))
    offset_W = np.arange(-reach, reach + 1, dtype=np.float64)
    kernel_W = np.exp(-0.5 * (offset_W / width) ** 2)
    known_N = np.isfinite(y_N)
    value_N = np.where(known_N, y_N, 0.0)

    def moment(power: int, of_N: np.ndarray) -> np.ndarray:
        # `full`, cut by hand: `same` would return the kernel's length where that is the longer one
        weights_W = (kernel_W * offset_W**power)[::-1]
        return np.convolve(of_N, weights_W, mode="full")[reach : reach + len(y_N)]

    weight_N = known_N.astype(np.float64)
    s0, s1, s2 = (moment(power, weight_N) for power in range(3))
    t0, t1 = moment(0, value_N), moment(1, value_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        center_N, mean_N = s1 / s0, t0 / s0
        spread_N = s2 / s0 - center_N**2
        # The line is held back a little (a ridge), or noise would tip it where points are on one side only.
        slope_N = (t1 / s0 - center_N * mean_N) / (spread_N + 0.15 * width**2)
        return np.where(s0 > 1e-6, mean_N - slope_N * center_N, np.nan)


def noise_of(losses: Sequence[float] | np.ndarray) -> float:
    """Standard deviation of the noise of a curve, from second differences, so that its course does not count.

    Robust: from the median of their magnitudes. 0 where there are fewer than 4 finite points.
    """
    y_N = np.asarray(losses, dtype=np.float64)
    y_N = y_N[np.isfinite(y_N)]
    if len(y_N) < 4:
        return 0.0
    second = y_N[2:] - 2 * y_N[1:-1] + y_N[:-2]
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6))
