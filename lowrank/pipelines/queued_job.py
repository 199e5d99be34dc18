"""One job of a run, wherever it is: in a slot, waiting for one, paused, or over; and how a checkpoint has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.config import JobConfig
from lowrank.data.prepare import Prepared
from lowrank.train.job import JobProgress

RUNNING, QUEUED, PAUSED, HELD, OVER = "running", "queued", "paused", "held", "over"
"""Where a job of a run is. HELD: a search waits for others before it decides."""


@dataclass
class QueuedJob:
    """One job of the run."""

    config: JobConfig
    data: Prepared
    state: str = QUEUED
    priority: int = 0
    """Of those that wait the highest is given a slot first, and a lower one that runs gives way to it."""
    turn: int = 0
    """Of equal priority the lowest is first."""
    progress: JobProgress = field(default_factory=JobProgress)
    """While it has no slot; one that has one is asked itself."""
    num_trainable: int = 0
    added: bool = False
    """By an order or a search: it is not in the run's settings."""
    changed: bool = False
    """By an order: its settings are not those of the run's."""

    @property
    def name(self) -> str:
        """The job's, which no other job of the run has."""
        return self.config.name

    def kept(self, slot: int | None) -> dict[str, Any]:
        """Plain JSON, for a checkpoint. `slot`: which it has; None: it has none."""
        return {
            "state": self.state,
            "priority": self.priority,
            "turn": self.turn,
            "slot": slot,
            "progress": dataclasses.asdict(self.progress),
            "num_trainable": self.num_trainable,
            "added": self.added,
            "settings": self.config.model_dump(mode="json") if self.added or self.changed else None,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take back what `kept` gave, but for slot and settings."""
        self.state, self.priority, self.turn = kept["state"], kept["priority"], kept["turn"]
        self.progress, self.num_trainable = JobProgress(**kept["progress"]), kept["num_trainable"]
        self.added, self.changed = kept["added"], not kept["added"] and kept["settings"] is not None
