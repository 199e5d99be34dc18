"""A request to stop that reaches one rank, heard by all at the same step."""

from __future__ import annotations

from pathlib import Path

from lowrank.ranks import Ranks
from lowrank.train.stopping import Stopping


class StoppingTogether(Stopping):
    """What a rank was asked travels with whatever the ranks tell one another, so `now` is the same on all of them.
    Only the first looks for the file."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        super().__init__(file if ranks.rank == 0 else None)
        self._ranks = ranks
        ranks.wants_to_stop = lambda: self.requested

    def now(self) -> bool:
        """Whether any rank was asked, as far as all know."""
        super().now()
        return self._ranks.stop_requested
