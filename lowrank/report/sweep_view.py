"""The table of a sweep: on the screen, and as parallel coordinates for report.html. From sweep.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from lowrank.report import formatting

_WIDTH, _HEIGHT, _MARGIN, _TOP, _BOTTOM = 720, 260, 60, 34, 16
_MOST = 200
"""Candidates that are drawn, the best of them; more cannot be told apart."""


def render_sweep(sweep: Mapping[str, Any]) -> Table:
    """The candidates for people, the best first."""
    names = fields(sweep)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False, title_justify="left")
    table.title = f"{len(sweep['candidates'])} candidates, search: {sweep['search']}, by {sweep['metric']}"
    table.add_column("", justify="right", no_wrap=True)
    for name in names:
        table.add_column(short(name, names), overflow="fold", min_width=min(8, longest(sweep, name)))
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("held-out", justify="right", no_wrap=True)
    table.add_column("above the best", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in sweep["candidates"]:
        best = row["name"] == sweep["best"]
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}{' ≈' if row['tied'] else '  '}"
        table.add_row(
            Text(f"{row['place']}{' ★' if best else '  '}"),
            *(Text(shown(row["values"].get(name, ""))) for name in names),
            f"{row['step']}/{row['num_steps']}",
            f"{result(row)}{half_width(row)}",
            Text(difference, "dim" if row["tied"] else ""),
            Text(row["state"].replace("_", " ")),
            style="bold" if best else "",
        )
    table.caption = "±: 95 % over the held-out rows.  ≈: as good as the best on these rows."
    table.caption_justify = "left"
    return table


def fields(sweep: Mapping[str, Any]) -> list[str]:
    """The settings in which candidates differ, in the order of the sweep."""
    return list(dict.fromkeys(name for row in sweep["candidates"] for name in row["values"]))


def short(name: str, names: Sequence[str]) -> str:
    """`rank` for `adapter.rank`, unless another ends so too."""
    last = name.rpartition(".")[2]
    return last if sum(each.rpartition(".")[2] == last for each in names) == 1 else name


def shown(value: Any) -> str:
    """A value of a setting in a cell, a number with four digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def result(row: Mapping[str, Any]) -> str:
    """What a candidate reached."""
    if row["score"] is not None:
        return f"{row['score']:.2f}"
    return formatting.loss(row["loss"])


def longest(sweep: Mapping[str, Any], name: str) -> int:
    """Characters of the longest value of a setting."""
    return max(len(shown(row["values"].get(name, ""))) for row in sweep["candidates"])


def half_width(row: Mapping[str, Any]) -> str:
    """` ± 0.034`."""
    ends = row["interval"]
    return "" if ends is None else f" ± {(ends[1] - ends[0]) / 2:.2g}"


def interval(ends: Sequence[float] | None) -> str:
    """`1.02 to 1.10`."""
    return "" if ends is None else f"{formatting.loss(ends[0])} to {formatting.loss(ends[1])}"


@dataclass(frozen=True)
class Axis:
    """One setting, or the result: where it stands, its name, and some of its values with their heights."""

    x: float
    name: str
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Course:
    """One candidate across all axes. `strength`: from 1 (the best) to 0."""

    name: str
    d: str
    strength: float
    pruned: bool


@dataclass(frozen=True)
class Parallel:
    """Parallel coordinates, for the template."""

    width: int
    height: int
    top: int
    bottom: int
    axes: tuple[Axis, ...]
    courses: tuple[Course, ...]


def parallel(sweep: Mapping[str, Any]) -> Parallel | None:
    """An axis for each setting and one for the result; None where there is nothing to draw."""
    rows = [row for row in sweep["candidates"] if row["loss"] is not None or row["score"] is not None][:_MOST]
    names = fields(sweep)
    if not rows or not names:
        return None
    results = [row["score"] if row["score"] is not None else row["loss"] for row in rows]
    columns = [[row["values"].get(name) for row in rows] for name in names] + [results]
    titles = [*(short(name, names) for name in names), sweep["metric"]]
    gap = (_WIDTH - 2 * _MARGIN) / max(1, len(columns) - 1)
    axes, heights = [], []
    for place, (title, values) in enumerate(zip(titles, columns)):
        height_of, ticks = _scale(values)
        axes.append(Axis(round(_MARGIN + place * gap, 1), title, ticks))
        heights.append(height_of)
    courses = []
    for place, row in enumerate(rows):
        points = [f"{axis.x} {height(values[place])}" for axis, height, values in zip(axes, heights, columns)]
        strength = 1.0 - place / max(1, len(rows) - 1)
        courses.append(Course(row["name"], "M" + "L".join(points), round(strength, 3), row["state"] == "pruned"))
    return Parallel(_WIDTH, _HEIGHT, _TOP, _HEIGHT - _BOTTOM, tuple(axes), tuple(reversed(courses)))


def _scale(values: Sequence[Any]) -> tuple[Any, tuple[tuple[float, str], ...]]:
    """Height of a value, and ticks: numbers on a line, over more than a factor of 20 on a logarithmic one; all else as
    words in their order."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 1:
        low, high = min(numbers), max(numbers)
        log = low > 0 and high / low > 20
        bend = math.log if log else float

        def of_number(value: float) -> float:
            return _height((bend(value) - bend(low)) / (bend(high) - bend(low)))

        few = sorted(set(numbers)) if len(set(numbers)) <= 6 else [low, high]
        return of_number, tuple((of_number(value), shown(float(value))) for value in few)
    labels = list(dict.fromkeys(shown(value) for value in values))
    places = {
        label: _height(index / (len(labels) - 1) if len(labels) > 1 else 0.5) for index, label in enumerate(labels)
    }
    return lambda value: places[shown(value)], tuple((places[label], label) for label in labels[:12])


def _height(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)
