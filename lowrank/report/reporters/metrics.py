"""`metrics.jsonl`: everything that was logged, one JSON object per line, kept exact over a resume."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import new_file
from lowrank.checkpoints.run_folder import METRICS
from lowrank.report.event_lines import as_line, decode, encode
from lowrank.report.events import EvalDone, Event, JobFinished, Notice, RunStarted, StepDone


class MetricsReporter:
    """Appends logged steps, evaluations, notices and the ends of jobs to `<output_dir>/metrics.jsonl`.

    Nothing is touched before `RunStarted`, which comes once the run folder is known to be ours; what was
    said before is kept and written then. Lines of a job beyond the step it goes on from are dropped first, so
    that after a resume the file says what an uninterrupted run's would, but for times and for notices about
    the interruption itself. A fresh run starts an empty file. Every line is in the file as soon as it is
    reported; steps whose loss is 0, not finite, or that were skipped are written like any other.
    """

    def __init__(self, output_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = output_dir / METRICS
        self._clock = clock
        self._file: io.FileIO | None = None
        self._early: list[tuple[Notice, float]] = []
        self._step: dict[str, int] = {}
        self._known: set[str] = set()

    def report(self, event: Event) -> None:
        """Append the event; notices that come before the run begins wait for its file."""
        now = self._clock()
        if isinstance(event, RunStarted):
            self._open(event)
        elif self._file is None:
            if isinstance(event, Notice):
                self._early.append((event, now))
        elif isinstance(event, StepDone):
            self._step[event.job] = event.step
            if event.logged or event.skipped:
                self._write(event, now)
        elif isinstance(event, (EvalDone, Notice)) or (
            isinstance(event, JobFinished) and event.reason != "interrupted"
        ):
            self._write(event, now)

    def _open(self, event: RunStarted) -> None:
        self._step = {job.name: job.first_step for job in event.jobs}
        over = {job.name for job in event.jobs if job.finished or job.first_step >= job.num_steps}
        kept = [line for line in _lines(self.path) if _before(line, self._step, over)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as partial:
            partial.write_bytes("".join(encode(line) + "\n" for line in kept).encode())
        # A notice of the first start comes again with every resume.
        self._known = {_identity(line) for line in kept if line.get("event") == "notice"}
        # Unbuffered, one write per line: whole lines survive a kill, and a signal handler may report too.
        self._file = io.FileIO(self.path, "a")
        for notice, at in self._early:
            self._write(notice, at)
        self._early.clear()
        self._known.clear()

    def _write(self, event: Event, now: float) -> None:
        assert self._file is not None
        job = getattr(event, "job", None)
        step = self._step.get(job, 0) if job else max(self._step.values(), default=0)
        line = as_line(event, step=step, time=now)
        if _identity(line) not in self._known:
            self._file.write((encode(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; losses that are not finite are floats again. A torn last line is left out."""
    return list(_lines(path))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    # not splitlines: U+2028 and its kin may stand in a text
    for text in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            yield decode(text)
        except ValueError:
            continue  # torn by a crash of the machine, of ours only the last line can be; or a stranger's


def _before(line: dict[str, Any], first_step: dict[str, int], over: set[str]) -> bool:
    """The resumed run would not say it again."""
    job = line.get("job")
    if all(step == 0 for step in first_step.values()):
        return False
    if line.get("event") == "job_finished":
        return job in over
    return line.get("step", 0) <= (max(first_step.values()) if job is None else first_step.get(job, 0))


def _identity(line: dict[str, Any]) -> str:
    return f"{line.get('job')}|{line.get('text')}"
