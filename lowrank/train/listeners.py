"""The listeners of a run's events: an error of one that records ends the run, of one that only watches does not."""

from __future__ import annotations

from collections.abc import Sequence

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
                problem = f"{type(error).__name__}: {error}"
                failed.append(f"{type(listener).__name__} failed and receives no more events: {problem}")
        for text in failed:
            self(Notice(text, level="warning"))
