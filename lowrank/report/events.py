"""What the training loop says while it runs, and the protocol of those who listen.

The loop knows reporters only through `Reporter`; a terminal view, a metrics file, TensorBoard and
Weights & Biases are each one small class. Times are seconds, memory is bytes, losses are nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Union


@dataclass(frozen=True)
class JobStarted:
    """One job of the run. `num_steps` counts all its optimizer steps; `first_step` is > 0 after a resume."""

    name: str
    num_steps: int
    first_step: int
    num_epochs: float
    num_trainable: int
    """Trainable parameters."""
    description: str = ""
    """A few words that tell it from the other jobs: `lora r=8, lr 2e-4`."""
    finished: str | None = None
    """After a resume: why it takes no more steps (a reason of `JobFinished`). None: it takes steps."""
    state: str = "running"
    """Or: queued (it waits for a slot), paused. As an event of its own, `JobStarted` says that a job has come, or has
    been given a slot."""
    pictures: bool = False
    """Its data show some."""


@dataclass(frozen=True)
class RunStarted:
    """The run is about to take its first step."""

    output_dir: Path
    jobs: tuple[JobStarted, ...]
    config: dict[str, Any]
    """The resolved configuration."""
    device: str
    dtype: str


@dataclass(frozen=True)
class StepDone:
    """One optimizer step of one job. Emitted every step; `logged` marks those `logging_steps` asks for."""

    job: str
    step: int
    """1 is the first."""
    epoch: float
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Tokens that went through the model for this job in this step."""
    loss_tokens: float
    """Sum of loss weights among them."""
    seconds: float
    """Wall time of the step, which the job shares with the other jobs of the run."""
    skipped: bool = False
    """Loss or gradient was not finite, the parameters were left alone."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the objective adds."""
    logged: bool = True


@dataclass(frozen=True)
class EvalDone:
    """A held-out evaluation of one job."""

    job: str
    step: int
    loss: float
    tokens: float
    best: bool
    """The best so far, by `metric`; its adapter was kept."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the objective adds, and `metric` if it is of generated answers (a percentage; higher is better)."""
    metric: str = "loss"
    """What decides which adapter is the best."""


@dataclass(frozen=True)
class CheckpointSaved:
    """The state of all jobs is on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class JobFinished:
    """A job has no more steps to take. `reason`: done, early_stopping, not_finite, stopped (by a command), pruned (by a
    search), failed (it could not begin), interrupted."""

    job: str
    step: int
    reason: str
    optimizer_state_bytes: int = 0
    """What its optimizer kept."""


@dataclass(frozen=True)
class JobMoved:
    """A job has lost its slot and will go on later, or waits for one again. `state`: queued, paused."""

    job: str
    step: int
    state: str


@dataclass(frozen=True)
class Notice:
    """Something a person should know. `level`: info, warning."""

    text: str
    level: str = "info"
    job: str | None = None


@dataclass(frozen=True)
class Stage:
    """What takes the time until the next event. Not kept."""

    text: str


@dataclass(frozen=True)
class Preparing:
    """Something long before the first step, so far. Said now and then, and not kept."""

    text: str
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class RunFinished:
    """The last event. `summary` is what stands in summary.json."""

    summary: dict[str, Any]
    interrupted: bool = False


Event = Union[  # noqa: UP007 (read at run time on Python 3.10)
    RunStarted, JobStarted, StepDone, EvalDone, CheckpointSaved, JobFinished, JobMoved, Notice, Stage, Preparing,
    RunFinished,
]  # fmt: skip
"""What a reporter receives."""


class Reporter(Protocol):
    """Somebody who listens: what other trainers call a callback. A run ends early by `lowrank.LiveRun(folder).end()`,
    from `report` too. A reporter that raises is left out from then on, the others receive a notice of it, and training
    goes on."""

    def report(self, event: Event) -> None:
        """Called in order, from the training thread, for every event; events it does not care for are ignored."""
        ...

    def close(self) -> None:
        """Called once, also after an error."""
        ...
