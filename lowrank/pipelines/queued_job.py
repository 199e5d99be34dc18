"""One job of a run, in a slot, waiting for one, paused, or finished; and its entry in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.config import JobConfig
from lowrank.data.prepare import Prepared
from lowrank.train.job import JobProgress

RUNNING, QUEUED, PAUSED, WAITING_FOR_RUNG, FINISHED = "running", "queued", "paused", "held", "over"
"""States of a job, as checkpoints and `lowrank jobs` write them. WAITING_FOR_RUNG: a search decides about the job when
other candidates have reached the same rung (search/halving.py)."""


@dataclass
class QueuedJob:
    """A job of the run, its data and its state."""

    config: JobConfig
    data: Prepared
    state: str = QUEUED
    priority: int = 0
    """The waiting job of highest priority is given a slot first, and preempts a running job of lower priority."""
    turn: int = 0
    """Order among jobs of equal priority, the lowest first."""
    progress: JobProgress = field(default_factory=JobProgress)
    """Last known progress while the job has no slot; while it has one, read `Job.progress`."""
    num_trainable: int = 0
    added: bool = False
    """Whether a live command or a search has added the job, which the run's settings do not have."""
    changed: bool = False
    """Whether a live command has changed the job's settings, so that the run's do not have them."""

    @property
    def name(self) -> str:
        """The job's name, which is unique in the run."""
        return self.config.name

    def to_json(self, slot: int | None) -> dict[str, Any]:
        """Return the job's entry in a checkpoint, as plain JSON. `slot`: the job's slot, None if it has none."""
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
        """Restore all but slot and settings from `kept`, what `to_json` has returned."""
        self.state, self.priority, self.turn = kept["state"], kept["priority"], kept["turn"]
        self.progress, self.num_trainable = JobProgress(**kept["progress"]), kept["num_trainable"]
        self.added, self.changed = kept["added"], not kept["added"] and kept["settings"] is not None
