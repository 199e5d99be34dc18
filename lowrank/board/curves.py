"""The points of a run's metrics.jsonl, read once and then only what is new, thinned for a screen.

The file grows while a run trains, and is replaced when it is resumed: then another file has its name, and everything
is read again.
"""

from __future__ import annotations

import math
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.checkpoints.run_folder import METRICS
from lowrank.foreign_files import find_object

_MOST_POINTS = 1200
_KEPT_NOTICES = 400
_PIECE = 1 << 18
"""Bytes that are read at a time: a long file takes no memory, and other requests are answered in between."""
_LINE = re.compile(
    rb'\{"event": "step", "job": "([^"\\\n]*)", "step": (\d+), "epoch": [^,\n]*, "loss": ([-\d.e+]+|null), [^\n]*\n'
    rb"|([^\n]*)\n"
)
"""A step as runs write it, by far the most lines (json would take ten times as long), or any other line."""


@dataclass
class Series:
    """One job's points, in the order of the file. A loss that was not finite is nan."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    losses: array[float] = field(default_factory=lambda: array("d"))
    held_out_steps: array[float] = field(default_factory=lambda: array("d"))
    held_out: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class After:
    """What a page that has a position lacks. `anew`: the file was replaced, and it must begin again. Points stand with
    the place in the file at which their line ends, by which a page knows those that it has.
    """

    position: str
    points: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    anew: bool = False


class Curves:
    """One run's file. `read` brings it up to date; other threads may ask meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.jobs: dict[str, Series] = {}
        self.notices: list[dict[str, Any]] = []
        self.ends: dict[str, str] = {}
        self.position = ""
        """Which file, and how far it was read: `inode-offset`."""
        self._inode, self._offset = -1, 0
        self._lock = threading.Lock()

    def read(self) -> None:
        """Read what is new."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    status = os.fstat(file.fileno())
                    if status.st_ino != self._inode or status.st_size < self._offset:
                        self._forget(status.st_ino)
                    file.seek(self._offset)
                    rest = b""
                    while piece := file.read(_PIECE):
                        whole, cut, rest = (rest + piece).rpartition(b"\n")
                        self._take(whole + cut)
                        self._offset += len(whole) + len(cut)
                        self.position = f"{self._inode}-{self._offset}"
            except OSError:
                self._forget(-1)

    def thinned(
        self, low: float = -math.inf, high: float = math.inf, most: int = _MOST_POINTS
    ) -> tuple[str, dict[str, Any]]:
        """What a page draws between two steps, `{job: {steps, losses, held_out_steps, held_out}}` (null for what is not
        finite), and the position up to which it goes: of one moment, or a point would come twice or never.
        """
        with self._lock:
            return self.position, {name: _drawn(series, low, high, most) for name, series in self.jobs.items()}

    def last_steps(self) -> dict[str, float]:
        """How far each job is."""
        with self._lock:
            return {name: series.steps[-1] for name, series in self.jobs.items() if series.steps}

    def after(self, position: str) -> After:
        """What came behind a position that a page has."""
        with self._lock:
            inode, _, offset = position.partition("-")
            if inode != str(self._inode) or not offset.isdecimal() or int(offset) > self._offset:
                return After(self.position, anew=True)
            try:
                with open(self.path, "rb") as file:
                    if os.fstat(file.fileno()).st_ino != self._inode:  # replaced since it was read
                        return After(self.position, anew=True)
                    file.seek(int(offset))
                    content = file.read(self._offset - int(offset))
            except OSError:
                return After(self.position, anew=True)
            end, points = int(offset), []
            for line in content.split(b"\n"):
                end += len(line) + 1
                if (entry := find_object(line)) is not None:
                    points.append((end, entry))
            return After(self.position, points=points)

    def _forget(self, inode: int) -> None:
        self.jobs, self.notices, self.ends = {}, [], {}
        self._inode, self._offset = inode, 0
        self.position = f"{inode}-0"

    def _take(self, lines: bytes) -> None:
        """Whole lines."""
        last, series = None, Series()
        for job, step, loss, other in _LINE.findall(lines):
            if not step:
                self._take_other(other)
                continue
            if job != last:
                last, series = job, self.jobs.setdefault(job.decode("utf-8", "replace"), Series())
            series.steps.append(float(step))
            series.losses.append(math.nan if loss == b"null" else float(loss))

    def _take_other(self, line: bytes) -> None:
        entry = find_object(line)
        if entry is None:
            return
        kind, job = entry.get("event"), str(entry.get("job"))
        if kind == "step":
            series = self.jobs.setdefault(job, Series())
            series.steps.append(_number(entry.get("step")))
            series.losses.append(_number(entry.get("loss")))
        elif kind == "eval":
            series = self.jobs.setdefault(job, Series())
            series.held_out_steps.append(_number(entry.get("step")))
            series.held_out.append(_number(entry.get("loss")))
        elif kind == "notice" and len(self.notices) < _KEPT_NOTICES:
            self.notices.append({key: entry.get(key) for key in ("job", "level", "text", "step", "time")})
        elif kind == "job_finished":
            self.ends[job] = str(entry.get("reason"))


class CurvesOfRuns:
    """The curves of the runs that were looked at last."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._kept: OrderedDict[Path, Curves] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> Curves:
        """The curves of a run folder, up to date."""
        with self._lock:
            curves = self._kept.setdefault(folder, Curves(folder / METRICS))
            self._kept.move_to_end(folder)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        curves.read()
        return curves


def _drawn(series: Series, low: float, high: float, most: int) -> dict[str, Any]:
    kept = thin(series.steps, series.losses, low, high, most)
    held = [place for place, step in enumerate(series.held_out_steps) if low <= step <= high]
    return {
        "steps": [series.steps[place] for place in kept],
        "losses": _finite(series.losses[place] for place in kept),
        "held_out_steps": [series.held_out_steps[place] for place in held],
        "held_out": _finite(series.held_out[place] for place in held),
        "points": len(series.steps),
    }


def thin(steps: array[float], values: array[float], low: float, high: float, most: int) -> list[int]:
    """Places of at most `most` points between two steps: of each stretch the lowest and the highest, so that no
    spike is lost, and the first and last of all.
    """
    inside: Sequence[int] = range(len(steps))
    if low > -math.inf or high < math.inf:
        inside = [place for place in inside if low <= steps[place] <= high]
    if len(inside) <= most:
        return list(inside)
    stretches = max(1, most // 2 - 1)
    kept = {inside[0], inside[-1]}
    for number in range(stretches):
        kept.update(
            _extremes(values, inside[number * len(inside) // stretches : (number + 1) * len(inside) // stretches])
        )
    return sorted(kept)


def _extremes(values: array[float], places: Sequence[int]) -> tuple[int, int]:
    """Where the lowest and the highest of them stand; not finite ones count only if all are."""
    if isinstance(places, range):
        part = values[places.start : places.stop]
        if math.isfinite(sum(part)):  # then all are, and the search is C's
            return places.start + part.index(min(part)), places.start + part.index(max(part))
    finite = [place for place in places if math.isfinite(values[place])] or places
    return min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)


def _finite(values: Iterable[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
