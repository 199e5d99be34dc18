"""The live view in a notebook: a table with a line for each job, and their loss curves below it."""

from __future__ import annotations

import html
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lowrank.report import formatting
from lowrank.report.curve import smooth
from lowrank.report.events import EvalDone, Event, Notice, Preparing, RunFinished, RunStarted, Stage
from lowrank.report.progress import JobView, RunProgress
from lowrank.report.reporters.plain import STATES, about, preparing, title

EVERY = 0.5
"""Seconds between two drawings at the least: a notebook keeps every byte it is sent."""
LATEST_NOTICES = 5
_WIDTH, _HEIGHT, _MARGIN = 640, 200, 36
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Paul Tol's bright scheme, which the color-blind can tell apart."""


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, where HTML can be shown."""
    if "IPython" not in sys.modules:
        return False
    shell: Any = importlib.import_module("IPython").get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


class NotebookReporter:
    """One output of the cell, drawn anew twice a second at the most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress = RunProgress()
        self._waiting = ""
        self._notices: list[Notice] = []
        self._held_out: dict[str, list[tuple[int, float]]] = {}
        self._handle: Any = None
        self._drawn = -math.inf

    def report(self, event: Event) -> None:
        """Note the event; draw table and curve anew if that is due."""
        now = self._clock()
        self._progress.consume(event, now)
        if isinstance(event, Notice):
            self._notices = [*self._notices, event]
        elif isinstance(event, (Stage, Preparing)):
            self._waiting = event.text if isinstance(event, Stage) else preparing(event)
        elif isinstance(event, EvalDone):
            self._held_out.setdefault(event.job, []).append((event.step, event.loss))
        if now - self._drawn >= EVERY or isinstance(event, (RunStarted, RunFinished)):
            self._draw(now)

    def close(self) -> None:
        """The last state stays in the notebook."""
        self._draw(self._clock())

    def _draw(self, now: float) -> None:
        self._drawn = now
        display = importlib.import_module("IPython.display")
        page = display.HTML(self.page(now))
        if self._handle is None:
            self._handle = display.display(page, display_id=True)
        else:
            self._handle.update(page)

    def page(self, now: float) -> str:
        """The view as HTML. Every text in it that comes from outside is escaped."""
        parts = [f"<p>{html.escape(text)}</p>" for text in self._lines(now)]
        jobs = list(self._progress.jobs.values())
        if jobs:
            parts += [_table(jobs), self._curves(jobs)]
        return "<div>" + "".join(parts) + "</div>"

    def _lines(self, now: float) -> list[str]:
        progress = self._progress
        shown = [each for each in self._notices if each.level == "warning"] or self._notices
        lines = [f"{'warning: ' if each.level == 'warning' else ''}{about(each)}" for each in shown[-LATEST_NOTICES:]]
        if progress.run is None:
            return [*lines, f"{self._waiting} ..."] if self._waiting else lines
        lines.append(title(progress.run))
        if progress.finished is not None:
            state = "interrupted" if progress.finished.interrupted else "finished"
            return [*lines, f"{state} after {formatting.duration(progress.elapsed(now))}"]
        left = formatting.duration(progress.seconds_left(now))
        return [*lines, f"{formatting.rate(progress.tokens_per_second)}, {left} left"]

    def _curves(self, jobs: Sequence[JobView]) -> str:
        """Training losses, smoothed, as lines; held-out losses as dots."""
        lines = [(job.name, *job.curve.points(), self._held_out.get(job.name, [])) for job in jobs]
        points = [(step, loss) for _, steps, losses, held in lines for step, loss in [*zip(steps, losses), *held]
                  if math.isfinite(loss)]  # fmt: skip
        if len(points) < 2:
            return ""
        low, high = min(loss for _, loss in points), max(loss for _, loss in points)
        last = max(self._progress.num_steps, 1)

        def place(step: float, loss: float) -> str:
            x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / last
            y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / ((high - low) or 1.0)
            return f"{x:.1f},{y:.1f}"

        shapes = [_text(2, _MARGIN, formatting.loss(high)), _text(2, _HEIGHT - _MARGIN, formatting.loss(low)),
                  _text(_WIDTH - 2 * _MARGIN, _HEIGHT - 8, f"step {last}")]  # fmt: skip
        for number, (name, steps, losses, held) in enumerate(lines):
            color = _COLORS[number % len(_COLORS)]
            course = [place(step, loss) for step, loss in zip(steps, smooth(losses)) if math.isfinite(loss)]
            shapes.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(course)}"/>')
            for step, loss in held:
                if math.isfinite(loss):
                    x, y = place(step, loss).split(",")
                    shapes.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
            shapes.append(_text(_MARGIN + 90 * number, 12, name[:14], color))
        return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="loss">{"".join(shapes)}</svg>'


def _table(jobs: Sequence[JobView]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("job", "step", "loss", "held out", "best", "learning rate", ""))
    rows = []
    for job in jobs:
        cells = (
            job.name,
            f"{job.step}/{job.started.num_steps}",
            _loss(job.loss),
            _loss(job.eval_loss),
            _loss(job.best_loss),
            "" if job.learning_rate is None else formatting.learning_rate(job.learning_rate),
            STATES.get(job.state, job.state),
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _loss(value: float | None) -> str:
    return "" if value is None else formatting.loss(value)


def _text(x: float, y: float, text: str, color: str = "currentColor") -> str:
    return f'<text x="{x}" y="{y}" font-size="11" fill="{color}">{html.escape(text)}</text>'
