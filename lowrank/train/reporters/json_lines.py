"""`--json`: one JSON object per line on standard output, for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from lowrank.train.event_lines import as_line, encode
from lowrank.train.events import Event, StepDone
from lowrank.train.progress import RunProgress


class JsonReporter:
    """Every event but the steps that are not logged; steps also say `tokens_per_second` and `seconds_left`.

    Only ASCII is written, whatever the encoding of the stream.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.time) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._progress = RunProgress()

    def report(self, event: Event) -> None:
        now = self._clock()
        self._progress.consume(event, now)
        if isinstance(event, StepDone) and not (event.logged or event.skipped):
            return
        line = as_line(event, step=self._progress.step, time=now)
        if isinstance(event, StepDone):
            line["tokens_per_second"] = self._progress.tokens_per_second
            line["seconds_left"] = self._progress.seconds_left(now)
        self._stream.write(encode(line, ascii=True) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """The stream is not ours to close."""
