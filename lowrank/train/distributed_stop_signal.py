"""A stop request to any rank of a run, seen by all ranks before the same step."""

from __future__ import annotations

from pathlib import Path

from lowrank.ranks import Ranks
from lowrank.train.stop_signal import StopSignal


class DistributedStopSignal(StopSignal):
    """Sends a stop request to all ranks with their next exchange (`Ranks.exchange`), so that `poll` returns the same on
    all of them. Only the first rank looks for the stop file."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        super().__init__(file if ranks.rank == 0 else None)
        self._ranks = ranks
        ranks.wants_to_stop = lambda: self.requested

    def poll(self) -> bool:
        """Return whether a stop was requested from any rank, as of the last exchange."""
        super().poll()
        return self._ranks.stop_requested
