"""Progress as records of Python's `logging`, for programs that train: warnings are WARNING, all else INFO."""

from __future__ import annotations

import time
from collections.abc import Callable

from lowrank.notices import LOGGER
from lowrank.report.events import Event, RunFinished
from lowrank.report.reporters.plain import PlainReporter
from lowrank.terminal import Console, visible


class LogReporter(PlainReporter):
    """The lines of `PlainReporter`, to the logger `lowrank`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(Console(quiet=True), clock=clock)

    def report(self, event: Event) -> None:
        """A record of the logger for each event that the plain view has a line for."""
        if isinstance(event, RunFinished):
            self._print("interrupted; a checkpoint is saved" if event.interrupted else "the run is finished")
        else:
            super().report(event)

    def _print(self, text: str, style: str | None = None) -> None:
        text = visible(text)  # a handler writes to a file or terminal, and may fail at half a character
        if style is not None:
            LOGGER.warning("%s", text.removeprefix("warning: "))
        else:
            LOGGER.info("%s", text)
