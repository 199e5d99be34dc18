"""`--json`: one JSON object per line on standard output, for programs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from lowrank.report.event_lines import as_line, encode
from lowrank.report.events import Event, RunFinished, RunStarted, Stage, StepDone
from lowrank.report.progress import RunProgress

SILENCE = 1.0
"""Seconds after which a line of progress is written if nothing else was."""


class JsonReporter:
    """Every event but the steps that are not logged; steps also say `tokens_per_second` and `seconds_left`.

    Whenever nothing was written for a second, a `progress` line is: what is being done, for how many seconds, the
    step, how fast and how long. A thread writes it, so a slow step, loading or evaluation is reported too. Only ASCII
    is written, whatever the encoding of the stream.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.time, *, silence: float = SILENCE
    ) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._silence = silence
        self._progress = RunProgress()
        self._lock = threading.RLock()  # re-entrant: the handler of Ctrl-C reports a notice, perhaps from within report
        self._doing, self._since = "starting", clock()
        self._written = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def report(self, event: Event) -> None:
        """Write the event as one line of JSON; of steps, those that are logged or skipped."""
        with self._lock:
            now = self._clock()
            self._progress.consume(event, now)
            self._note(event, now)
            if isinstance(event, StepDone) and not (event.logged or event.skipped):
                return
            line = as_line(event, step=self._progress.step, time=now)
            if isinstance(event, StepDone):
                line |= self._pace(now)
            self._write(line)

    def _note(self, event: Event, now: float) -> None:
        if isinstance(event, Stage):
            self._doing, self._since = event.text, now
        elif isinstance(event, (RunStarted, StepDone)):
            self._doing, self._since = "training", now
        if isinstance(event, RunFinished):
            self._over.set()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True, name="lowrank-progress")
            self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(max(0.01, self._written + self._silence - time.monotonic())):
            if time.monotonic() - self._written < self._silence:
                continue
            with self._lock:
                if self._over.is_set():
                    return
                now = self._clock()
                line = {"event": "progress", "step": self._progress.step, "num_steps": self._progress.num_steps}
                line |= {"doing": self._doing, "seconds": round(now - self._since, 3), **self._pace(now)}
                try:
                    self._write(line | {"time": round(now, 3)})
                except (OSError, ValueError):  # nobody reads any more
                    return

    def _pace(self, now: float) -> dict[str, Any]:
        known = self._progress.run is not None
        return {
            "tokens_per_second": self._progress.tokens_per_second,
            "seconds_left": self._progress.seconds_left(now) if known else None,
        }

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(encode(line, ascii=True) + "\n")
        self._stream.flush()
        self._written = time.monotonic()

    def close(self) -> None:
        """The stream is not ours to close."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
