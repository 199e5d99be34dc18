"""The listeners of a run's events: an error of one that records ends the run, of one that only watches does not."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lowrank.notices import LOGGER
from lowrank.report.events import Event, Notice, Reporter


class Listeners:
    """Hands every event to every listener, in order.

    `keeping`: those that keep what the run leaves behind; their errors are the run's. One of the others that fails is
    left out from then on, and the others receive a notice of it.
    """

    def __init__(self, keeping: Sequence[Reporter], watching: Sequence[Reporter] = ()) -> None:
        self.keeping, self.watching = list(keeping), list(watching)

    def __call__(self, event: Event) -> None:
        for listener in self.keeping:
            listener.report(event)
        failed: list[str] = []
        for listener in list(self.watching):
            try:
                listener.report(event)
            except Exception as error:  # a tracker without a network, a pipe that nobody reads any more
                self.watching.remove(listener)
                name, problem = _name_of(listener), f"{type(error).__name__}: {error}"
                level = logging.WARNING if hasattr(listener, "function") else logging.INFO
                LOGGER.log(level, "%s failed on %s:", name, type(event).__name__, exc_info=error)
                failed.append(f"{name} failed and receives no more events: {problem}")
        for text in failed:
            self(Notice(text, level="warning"))


def _name_of(listener: Reporter) -> str:
    """Of a function that a person gave, its own name; else that of the listener's class."""
    function = getattr(listener, "function", listener)
    return str(getattr(function, "__qualname__", type(function).__name__)).replace("<locals>.", "")
