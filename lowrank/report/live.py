"""What the jobs of a run do now, for whoever has the run folder: from commands/state.json."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoints.live_commands import read_state
from lowrank.checkpoints.run_folder import writer_of


@dataclass(frozen=True)
class LiveJob:
    """One job of a run. Losses are nats per token, times seconds."""

    name: str
    state: str
    """running, queued, paused, held (by a search), or why it is over: done, early_stopping, not_finite, stopped,
    pruned, interrupted."""
    step: int
    num_steps: int
    loss: float | None
    """Of training, smoothed."""
    held_out_loss: float | None
    best_loss: float | None
    learning_rate: float | None
    priority: int
    verdict: str
    """What its curve says (report/verdict.py): falling, flat, overfitting, diverged, too_short."""
    sentence: str
    """The same for people."""
    seconds_left: float | None
    """None where it takes no steps, or nobody can say."""
    description: str


UNSEEN_SECONDS = 600.0
"""A run on a machine whose processes cannot be seen from here trains if it wrote its state so recently."""


def is_training(run: Path) -> bool:
    """Whether a process trains this run now, or is about to."""
    writer, state = writer_of(run), read_state(run)
    written = state.get("time", 0.0)
    if state.get("ended") and written >= writer.started:
        return False
    return written > time.time() - UNSEEN_SECONDS if writer.lives is None else writer.lives


def jobs_of(run: Path, *, training: bool) -> list[LiveJob]:
    """The jobs in the order in which they came; empty before the run's first step."""
    state = read_state(run)
    age = max(0.0, time.time() - state.get("time", time.time()))
    return [_live(job, age, training) for job in state.get("jobs", ())]


def _live(job: dict[str, Any], age: float, training: bool) -> LiveJob:
    left = job["seconds_left"]
    return LiveJob(
        name=job["name"],
        state=job["state"] if training or job["state"] not in ("running", "waiting") else "interrupted",
        step=job["step"],
        num_steps=job["num_steps"],
        loss=job["loss"],
        held_out_loss=job["held_out_loss"],
        best_loss=job["best_loss"],
        learning_rate=job["learning_rate"],
        priority=job["priority"],
        verdict=job["verdict"]["kind"],
        sentence=job["verdict"]["sentence"],
        seconds_left=None if left is None or not training else max(0.0, left - age),
        description=job["description"],
    )
