"""Learning-rate schedules, per job."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from lowrank.settings import Fraction, NonNegative, Positive, Settings

SCHEDULES_WITH = {
    "num_cycles": ("cosine_with_restarts",),
    "min_ratio": ("linear", "cosine", "polynomial", "warmup_stable_decay"),
    "power": ("polynomial",),
    "num_stable_steps": ("warmup_stable_decay",),
    "num_decay_steps": ("warmup_stable_decay",),
    "decay_type": ("warmup_stable_decay",),
}
"""Settings that only some schedules read."""


class ScheduleConfig(Settings):
    """How the learning rate moves over a job's optimizer steps."""

    type: Literal[
        "linear",
        "cosine",
        "constant",
        "cosine_with_restarts",
        "inverse_sqrt",
        "polynomial",
        "warmup_stable_decay",
    ] = "cosine"
    """Shape after the warmup; all but constant, cosine_with_restarts and inverse_sqrt end at `min_ratio`. Names and
    formulas as in transformers; warmup_stable_decay stays at the peak for a while and then falls as cosine does."""
    warmup_steps: NonNegative = 0
    """Steps of linear growth from 0."""
    warmup_ratio: Fraction = 0.0
    """Instead of `warmup_steps`: this share of all steps."""
    min_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of the peak (linear, cosine, polynomial, warmup_stable_decay)."""
    num_cycles: int = Field(default=1, gt=0)
    """Restarts of cosine_with_restarts."""
    power: float = Field(default=1.0, gt=0)
    """Of polynomial; 1 is linear."""
    num_stable_steps: NonNegative | None = None
    """Of warmup_stable_decay: steps at the peak. Left out: a third of those after the warmup."""
    num_decay_steps: Positive | None = None
    """Of warmup_stable_decay: steps of decay. Left out: all that come after the stable ones."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    """Of warmup_stable_decay: how the learning rate falls."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self

    def warmup(self, num_steps: int) -> int:
        """Steps of warmup, of `num_steps`."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * num_steps)

    def factor(self, step: int, num_steps: int) -> float:
        """What the peak learning rate is multiplied by at `step` (0 is the first) of `num_steps`."""
        warmup = self.warmup(num_steps)
        if step < warmup:
            floor = self.min_ratio if self.type == "warmup_stable_decay" else 0.0
            return floor + (1.0 - floor) * step / max(1, warmup)
        if self.type == "constant":
            return 1.0
        if self.type == "inverse_sqrt":
            # transformers: the time scale is the warmup, or 10,000 steps without one
            scale = warmup or 10_000
            return 1.0 / math.sqrt((step + scale - warmup) / scale)
        if self.type == "warmup_stable_decay":
            return self._stable_decay(step - warmup, num_steps - warmup)
        progress = (step - warmup) / max(1, num_steps - warmup)
        if progress >= 1.0:
            return self.min_ratio if self.type != "cosine_with_restarts" else 0.0
        if self.type == "polynomial":
            shape = (1.0 - progress) ** self.power
        elif self.type == "linear":
            shape = 1.0 - progress
        elif self.type == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            return 0.5 * (1.0 + math.cos(math.pi * ((self.num_cycles * progress) % 1.0)))
        return self.min_ratio + (1.0 - self.min_ratio) * shape

    def _stable_decay(self, step: int, num_steps: int) -> float:
        """`step` and `num_steps` after the warmup. LLaMA-Factory's shares, transformers' formulas."""
        stable = num_steps // 3 if self.num_stable_steps is None else self.num_stable_steps
        decay = num_steps - stable if self.num_decay_steps is None else self.num_decay_steps
        if step < stable:
            return 1.0
        if step >= stable + decay:
            return self.min_ratio
        progress = (step - stable) / max(1, decay)
        shapes = {"linear": 1.0 - progress, "1-sqrt": 1.0 - math.sqrt(progress)}
        shape = shapes.get(self.decay_type, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return self.min_ratio + (1.0 - self.min_ratio) * shape


def length_notice(schedule: ScheduleConfig, peak: float, step: int, before: int, now: int) -> str | None:
    """Return what a person should know where a job that has taken `step` of `before` steps now has `now` in all: that
    its learning rate jumps, and from which value to which. None where the steps so far had the rates that they would
    have had in a run of `now` steps. `peak`: the learning rate that the schedule's factors multiply."""
    if before == now or all(schedule.factor(each, before) == schedule.factor(each, now) for each in range(step)):
        return None
    last, following = peak * schedule.factor(step - 1, before), peak * schedule.factor(step, now)
    return (
        f"schedule: {schedule.type} now spans {now} steps instead of {before}, so the learning rate goes from "
        f"{last:.1e} (step {step}) to {following:.1e} (step {step + 1}), as it does not in a run of that length from "
        "the beginning; a constant schedule has no such jump"
    )
