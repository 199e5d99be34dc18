"""The live view on a terminal: one line per job, and below it the run as a whole."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import rich.console
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowrank.report import formatting
from lowrank.report.curve import smooth
from lowrank.report.events import Event, Notice, Preparing, RunFinished, RunStarted, Stage
from lowrank.report.process_memory import MemoryUse, memory_use
from lowrank.report.progress import JobView, RunProgress
from lowrank.report.reporters.plain import STATES, about, preparing, title
from lowrank.report.summary_view import render_summary

LATEST_NOTICES = 3
MOST_WARNINGS = 20
"""So many stay on the screen when the run is over; all are in metrics.jsonl."""
STYLES = {
    "waiting": "dim",
    "running": "cyan",
    "done": "green",
    "early_stopping": "green",
    "not_finite": "red",
    "interrupted": "yellow",
    "queued": "dim",
    "paused": "yellow",
    "stopped": "yellow",
    "pruned": "dim",
    "failed": "red",
}


class TerminalReporter:
    """Redraws a few times a second from a thread of rich; events only change what is drawn."""

    def __init__(self, console: rich.console.Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._progress = RunProgress()
        self._lock = threading.RLock()  # re-entrant: Ctrl-C's handler reports a notice, perhaps from within report
        self._live: Live | None = None
        self._waiting: Progress | None = None
        self._notices: list[Notice] = []
        self._memory = _Sampled(memory_use, every=1.0)

    def report(self, event: Event) -> None:
        """Note the event; the live view shows it at its next refresh."""
        with self._lock:
            self._progress.consume(event, self._clock())
        if isinstance(event, Notice):
            self._notice(event)
        elif isinstance(event, (Stage, Preparing)):
            self._wait(event)
        elif isinstance(event, RunStarted):
            self._end_waiting()
            self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=4)
            self._live.start(refresh=True)
        elif isinstance(event, RunFinished):
            self.close()
            self._console.print(render_summary(event.summary))

    def _wait(self, event: Stage | Preparing) -> None:
        """What is going on before the first step, for how long already, and, where that is known, for how long yet."""
        if self._live is not None:
            return
        if self._waiting is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._waiting = Progress(*columns, console=self._console, transient=True)
            self._waiting.start()
        for task in self._waiting.task_ids:
            if self._waiting.tasks[0].fields["stage"] != event.text:
                self._waiting.remove_task(task)
        description = event.text if isinstance(event, Stage) else preparing(event)
        if self._waiting.task_ids:
            self._waiting.update(self._waiting.task_ids[0], description=description)
        else:
            self._waiting.add_task(description, total=None, stage=event.text)

    def _end_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.stop()

    def _notice(self, notice: Notice) -> None:
        if self._live is None:
            self._console.print(_notice_line(notice))
        else:
            self._notices.append(notice)

    def close(self) -> None:
        """Leave the last state on the screen, and every warning under it."""
        self._end_waiting()
        live, self._live = self._live, None
        if live is None:
            return
        live.stop()
        hidden = [notice for notice in self._notices[:-LATEST_NOTICES] if notice.level == "warning"]
        for notice in hidden[:MOST_WARNINGS]:
            self._console.print(_notice_line(notice))
        if len(hidden) > MOST_WARNINGS:
            self._console.print(f"   ... {len(hidden) - MOST_WARNINGS} more in metrics.jsonl", style="dim")
        self._console.print()

    def _draw(self) -> RenderableType:
        with self._lock:
            device = self._progress.run.device if self._progress.run else "cpu"
            return LiveView(self._progress, list(self._notices), self._memory(device), self._clock())


@dataclass
class LiveView:
    """What is drawn; fits any width and height it is given."""

    progress: RunProgress
    notices: list[Notice]
    """Since the view began; those before stand above it."""
    memory: MemoryUse
    now: float

    def __rich_console__(self, console: rich.console.Console, options: ConsoleOptions) -> RenderResult:
        assert self.progress.run is not None
        notices = [_notice_line(notice) for notice in self.notices[-LATEST_NOTICES:]]
        lines = sum(len(notice.wrap(console, options.max_width - 2)) for notice in notices)
        height = options.height or console.height
        yield Padding(
            Group(
                Text(title(self.progress.run), style="bold", no_wrap=True, overflow="ellipsis"),
                Text(),
                *self._jobs(options, room=height - lines - 8),
                Text(),
                self._run(options.max_width - 2),
                *notices,
            ),
            (1, 1, 0, 1),
        )

    def _jobs(self, options: ConsoleOptions, room: int) -> list[RenderableType]:
        jobs = list(self.progress.jobs.values())
        shown = jobs
        if len(jobs) > max(1, room):
            # Those that run are kept, all stay in their order: nobody moves while nothing ends.
            kept = {job.name for job in sorted(jobs, key=lambda job: not job.running)[: max(1, room - 1)]}
            shown = [job for job in jobs if job.name in kept]
        columns = _columns(options, shown)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        for column in columns:
            table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
        for job in shown:
            table.add_row(*(column.cell(job, self.progress, self.now) for column in columns))
        hidden = [job for job in jobs if job not in shown]
        return [table, _folded(hidden)] if hidden else [table]

    def _run(self, width: int) -> Text:
        progress, memory = self.progress, self.memory
        left = progress.seconds_left(self.now)
        over = not any(job.running for job in progress.jobs.values())
        parts = [
            Text(formatting.rate(progress.tokens_per_second), style="bold"),
            Text(f"memory {formatting.gigabytes(memory.now)}, peak {formatting.gigabytes(memory.peak)}"),
            Text(f"elapsed {formatting.duration(progress.elapsed(self.now))}"),
        ]
        if memory.device_now is not None and memory.device_peak is not None:
            used = f"{formatting.gigabytes(memory.device_now)}, peak {formatting.gigabytes(memory.device_peak)}"
            parts.insert(2, Text(f"GPU {used}"))
        if not over:
            parts.append(Text(f"about {formatting.duration(left)} left" if left is not None else "measuring"))
        if progress.checkpoint_step is not None:
            parts.append(Text(f"saved at step {progress.checkpoint_step}", style="dim"))
        return _flowing(parts, width)


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[JobView, RunProgress, float], RenderableType]
    width: int
    right: bool = True


def _columns(options: ConsoleOptions, jobs: list[JobView]) -> list[_Column]:
    """As many as fit, the most wanted first, in the order a person reads them."""
    name = max([4, *(Text(job.name).cell_len for job in jobs)])
    steps = max(4, *(2 * len(str(job.started.num_steps)) + 1 for job in jobs)) if jobs else 4
    name = min(name, max(8, options.max_width // 4))
    unicode = options.encoding.startswith("utf")
    wanted = [  # order of reading, order of importance
        (0, _Column("job", lambda job, *_: Text(_cut(job.name, name), style="bold"), name, right=False)),
        (4, _Column("", lambda job, *_: _bar(job, 24), 24, right=False)),
        (1, _Column("step", lambda job, *_: Text(f"{job.step}/{job.started.num_steps}"), steps)),
        (7, _Column("epoch", lambda job, *_: Text(f"{job.epoch:.2f}", style="dim"), 5)),
        (8, _Column("", lambda job, *_: Text(_sparkline(job, 16), style="blue"), 16, right=False)),
        (2, _Column("loss", lambda job, *_: Text(formatting.loss(job.loss)), 7)),
        (5, _Column("held-out", lambda job, *_: _held_out(job, unicode), 8)),
        (6, _Column("lr", lambda job, *_: Text(formatting.learning_rate(job.learning_rate), style="dim"), 7)),
        (3, _Column("", lambda job, progress, now: _state(job, progress, now), 13, right=False)),
    ]
    if not unicode:
        wanted = [entry for entry in wanted if entry[0] != 8]
    room = options.max_width - 2
    chosen = []
    for importance, column in sorted(wanted, key=lambda entry: entry[0]):
        room -= column.width + (2 if chosen else 0)
        if room < 0:
            break
        chosen.append(importance)
    return [column for importance, column in wanted if importance in chosen] or [wanted[0][1]]


def _bar(job: JobView, width: int) -> RenderableType:
    over = "red" if job.state == "not_finite" else "yellow" if job.state == "interrupted" else "green"
    style = "cyan" if job.state in ("waiting", "running") else over
    return ProgressBar(
        total=max(1, job.started.num_steps),
        completed=job.step,
        width=width,
        complete_style=style,
        finished_style=over,
        style="bright_black",
    )


def _held_out(job: JobView, unicode: bool) -> Text:
    if job.eval_loss is None:
        return Text("-", style="dim")
    mark = ("★" if unicode else "*") if job.eval_is_best else " "
    value = formatting.loss(job.eval_loss) if job.eval_score is None else f"{job.eval_score:.1f} %"
    return Text(f"{value}{mark}", style="green" if job.eval_is_best else "")


def _state(job: JobView, progress: RunProgress, now: float) -> Text:
    if job.state == "running" and not job.idle:
        left = progress.seconds_left(now, job.name)
        text = Text(f"{formatting.duration(left)} left", style=STYLES["running"])
    else:
        text = Text(STATES.get(job.state, job.state), style=STYLES.get(job.state, ""))
    if job.skipped:
        text.append(f" {job.skipped} skipped", style="yellow")
    return text


def _sparkline(job: JobView, width: int) -> str:
    """The course of the loss so far, high to low, in eighths of a line."""
    _, losses = job.curve.points()
    level = [value for value in smooth(losses) if math.isfinite(value)]
    if len(level) < 2:
        return ""
    places = [round(index * (len(level) - 1) / (width - 1)) for index in range(width)]
    chosen = [level[place] for place in (places if len(level) >= width else range(len(level)))]
    low, high = min(chosen), max(chosen)
    spread = max(high - low, 1e-3 * abs(high), 1e-12)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (value - low) / spread))] for value in chosen)


def _folded(jobs: list[JobView]) -> Text:
    """The jobs there is no room for."""
    counts: dict[str, int] = {}
    for job in jobs:
        counts[STATES.get(job.state, job.state)] = counts.get(STATES.get(job.state, job.state), 0) + 1
    listed = ", ".join(f"{number} {state}" for state, number in counts.items())
    return Text(f"and {len(jobs)} more: {listed}", style="dim", no_wrap=True, overflow="ellipsis")


def _notice_line(notice: Notice) -> Text:
    if notice.level == "warning":
        return Text("! ", style="bold yellow").append(about(notice), style="not bold yellow")
    return Text("· ", style="dim").append(about(notice))


def _flowing(parts: list[Text], width: int) -> Text:
    """Parts side by side, broken between them where the line is full."""
    text, used = Text(), 0
    for part in parts:
        if used and used + 3 + part.cell_len > width:
            text.append("\n")
            used = 0
        elif used:
            text.append(" · ", style="dim")
            used += 3
        text.append_text(part)
        used += part.cell_len
    return text


def _cut(name: str, width: int) -> str:
    text = Text(name)
    text.truncate(width, overflow="ellipsis")
    return text.plain


class _Sampled:
    """A measurement that is taken at most once in `every` seconds."""

    def __init__(self, measure: Callable[[str], MemoryUse], every: float) -> None:
        self._measure, self._every = measure, every
        self._last: tuple[float, MemoryUse] | None = None

    def __call__(self, device: str) -> MemoryUse:
        now = time.monotonic()
        if self._last is None or now - self._last[0] >= self._every:
            self._last = (now, self._measure(device))
        return self._last[1]
