"""The loss curves of a run as SVG that follows the page's colors, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank.report.curve import smooth

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
_MOST_POINTS = 500

Points = list[tuple[float, float]]


@dataclass
class Line:
    """One job's curves: `(step, value)` points. `number` decides its color."""

    name: str
    number: int
    train: Points = field(default_factory=list)
    held_out: Points = field(default_factory=list)
    scores: Points = field(default_factory=list)


def lines_of(metrics: Iterable[Mapping[str, Any]]) -> list[Line]:
    """The finite losses and scores in the lines of a metrics.jsonl, by job."""
    jobs: dict[str, Line] = {}
    for entry in metrics:
        if entry.get("event") not in ("step", "eval"):
            continue
        job = jobs.setdefault(entry["job"], Line(entry["job"], len(jobs)))
        kind = job.train if entry["event"] == "step" else job.held_out
        if math.isfinite(entry["loss"]):
            kind.append((entry["step"], entry["loss"]))
        score = entry.get("metrics", {}).get(entry.get("metric"))
        if score is not None and math.isfinite(score):
            job.scores.append((entry["step"], score))
    return list(jobs.values())


@dataclass(frozen=True)
class Drawn:
    """One polyline: `d` is an SVG path. `kind`: raw, smooth or dots."""

    number: int
    kind: str
    d: str
    dots: tuple[tuple[float, float, str], ...] = ()
    """(x, y, what to say) of points that are marked."""


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    width: int
    height: int
    left: int
    bottom: int
    drawn: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def loss_chart(lines: Sequence[Line]) -> Chart | None:
    """Training losses as logged and smoothed, and held-out losses as dots; None if there is no loss."""
    shown: list[tuple[int, str, Points, str]] = []
    for line in lines:
        steps, values = [step for step, _ in line.train], [value for _, value in line.train]
        shown.append((line.number, "raw", line.train, line.name))
        shown.append((line.number, "smooth", list(zip(steps, smooth(values).tolist())), line.name))
        shown.append((line.number, "dots", line.held_out, f"{line.name}, held-out"))
    bulk = [value for _, kind, points, _ in shown if kind != "raw" for _, value in points]
    return _chart(shown, bulk)


def score_chart(lines: Sequence[Line]) -> Chart | None:
    """Scores of generated answers; None if there are none."""
    shown = [(line.number, "dots", line.scores, line.name) for line in lines]
    return _chart(shown, [value for line in lines for _, value in line.scores])


def _chart(shown: Sequence[tuple[int, str, Points, str]], bulk: Sequence[float]) -> Chart | None:
    steps = [step for _, _, points, _ in shown for step, _ in points]
    bulk = [value for value in bulk if math.isfinite(value)]
    if not steps or not bulk:
        return None
    low, high = min(bulk), max(bulk)
    middle = float(np.median(bulk))
    if high - middle > 12 * max(middle - low, 1e-12):  # one that exploded leaves the others readable
        high = middle + 12 * max(middle - low, 1e-12)
    margin = 0.05 * max(high - low, 1e-3 * abs(high), 1e-9)
    low, high = low - margin, high + margin
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - min(max(value, low), high)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    drawn = []
    for number, kind, points, label in shown:
        kept = [(step, value) for step, value in _thinned(points) if math.isfinite(value)]
        placed = [place(*point) for point in kept]
        path = "M" + "L".join(f"{x} {y}" for x, y in placed) if placed else ""
        labels = [f"{label}: {value:.4g}, step {step:g}" for step, value in kept]
        dots = tuple((x, y, text) for (x, y), text in zip(placed, labels)) if kind == "dots" else ()
        drawn.append(Drawn(number, kind, path, dots))
    return Chart(
        _WIDTH,
        _HEIGHT,
        _LEFT,
        _HEIGHT - _BOTTOM,
        tuple(each for each in drawn if each.d),
        tuple((place(tick, low)[0], f"{tick:g}") for tick in _ticks(first, last) if tick == int(tick)),
        tuple((place(first, tick)[1], f"{tick:g}") for tick in _ticks(low, high)),
    )


def _thinned(points: Points) -> Points:
    """At most so many, evenly, the last one among them."""
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(place)] for place in np.linspace(0, len(points) - 1, _MOST_POINTS)]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between."""
    size = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(size * many for many in (1, 2, 5, 10) if (high - low) / (size * many) <= 6)
    return [round(step * place, 12) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
