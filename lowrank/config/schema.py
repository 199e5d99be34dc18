"""The settings of a run: one base model, and one or more jobs on it.

A job is one adapter (or the whole base, with `tuning: full`) with its data, objective and optimiser.
What a job needs may stand at the top level, where it holds for every job, or in an entry of `jobs`,
where it overrides the top. After reading, `RunConfig.jobs` is never empty and every job is complete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

import lowrank.data.config
import lowrank.models.config
from lowrank.adapters.variants import AdapterConfig
from lowrank.config.checks import conflicts
from lowrank.config.jobs import complete_jobs, spell_out
from lowrank.models.config import FreezeConfig
from lowrank.objectives import ObjectiveConfig
from lowrank.settings import Auto, NonNegative, Positive, Settings
from lowrank.train.optimizers import OptimizerConfig
from lowrank.train.schedule import ScheduleConfig

Interval = Union[Positive, Annotated[float, Field(gt=0, lt=1)]]  # noqa: UP007 (read at run time on Python 3.10)
"""A number of optimiser steps, or, below 1, a share of the run."""

EvalMetric = Literal[
    "loss",
    "exact_match",
    "bleu4",
    "rouge1",
    "rouge2",
    "rougeL",
    "llamafactory_bleu4",
    "llamafactory_rouge1",
    "llamafactory_rouge2",
    "llamafactory_rougeL",
]
"""The held-out loss, or a metric of evaluate/metrics.py."""

DEFAULT_JOB = "default"
"""The name of the one job of a file without `jobs`."""


class SettingsConflict(ValueError):
    """Settings that are right one by one but not together. `problems` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class JobSettings(Settings):
    """What may stand at the top level for every job, or in an entry of `jobs` for one."""

    data: lowrank.data.config.Config = Field(default_factory=lowrank.data.config.Config)
    """What is learned from."""
    adapter: AdapterConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """The low-rank update that is trained; only its type stands for `{type: ...}`."""
    objective: ObjectiveConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """What is minimised."""
    optimizer: OptimizerConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """How parameters are updated; only its type stands for `{type: ...}`."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """How the learning rate moves."""
    tuning: Literal["adapter", "full", "freeze"] = "adapter"
    """adapter: the base stays as it is and an adapter is trained. full: the base's own parameters are trained. freeze:
    some of its layers are. A run of the last two has one job."""
    freeze: FreezeConfig = Field(default_factory=FreezeConfig)
    """With `tuning: freeze`: what is trained."""
    seed: NonNegative = 42
    """Decides the adapter's initial values, the order of the rows, the held-out rows, dropout and noise."""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows; fractions are fine."""
    max_steps: Positive | None = None
    """Optimiser steps, instead of `num_train_epochs`."""
    early_stopping_patience: Positive | None = None
    """Stop the job after this many evaluations in a row without a gain in `eval_metric`."""
    eval_metric: EvalMetric = "loss"
    """What decides which adapter is kept as `best`, and early stopping. loss: the held-out loss. The others compare
    generated answers to held-out questions with those in the data, higher is better; of equal ones the lower loss is
    the better. All but exact_match need `pip install lowrank[metrics]`."""
    eval_generate_samples: Positive | None = 64
    """Held-out questions that are answered at each evaluation for `eval_metric`, spread over the held-out rows; null:
    all."""
    eval_max_new_tokens: Positive = 256
    """Tokens of such an answer at the most."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Strength of NEFTune noise on the input embeddings while training (arXiv:2310.05914); 5 is usual. Left out: no
    noise."""


class JobConfig(JobSettings):
    """One job, complete."""

    @property
    def trains_base(self) -> bool:
        """Its result is a whole model, not an adapter."""
        return self.tuning != "adapter"

    name: str = Field(max_length=100, pattern=r"^\w[\w.+=-]*$")
    """What the job is called; also its folder in `output_dir`."""


class RunConfig(JobSettings):
    """A run."""

    model: lowrank.models.config.Config
    """The base; only its path stands for `{path: ...}`."""
    jobs: tuple[JobConfig, ...] = ()
    """Jobs trained at the same time on the one base. An entry has a `name` and whatever differs from the top level; a
    group of settings is overridden setting by setting. Left out: one job named `default`."""
    output_dir: Path
    """The run folder: `summary.json`, `metrics.jsonl`, `loss.png` and one folder per job. Relative to the current
    directory."""
    save_steps: Interval | None = 500
    """Optimiser steps between checkpoints, or a share of the run (0.1: ten times); null: only at the end."""
    save_total_limit: Positive | None = 1
    """Keep this many checkpoints; null: all. A job's best and last adapters are always kept."""
    eval_steps: Interval | None = 0.1
    """Optimiser steps between evaluations on the held-out rows, or a share of the job; null: only at the end."""
    logging_steps: Interval = 10
    """Optimiser steps between logged losses, or a share of the job."""
    micro_batch_tokens: Auto | Positive = "auto"
    """Tokens of one forward pass over all jobs together. Smaller saves memory; the result stays the same. auto: 4096,
    or as many as fit into memory."""
    ignore_memory_plan: bool = False
    """Start even if the run needs more memory than is free; without, a run that surely does not fit is refused."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab"], ...] = ()
    """Where to send metrics besides `metrics.jsonl`."""
    resume: bool = False
    """Go on from the last checkpoint in `output_dir`; if there is none, start from the beginning."""
    overwrite: bool = False
    """Delete the run that is in `output_dir`."""

    @model_validator(mode="before")
    @classmethod
    def _complete_jobs(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = spell_out(value)
        return {**value, "jobs": complete_jobs(value, tuple(JobSettings.model_fields), DEFAULT_JOB)}

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        problems = conflicts(self)
        if problems:
            raise SettingsConflict(problems)
        return self


def steps_of(interval: float | None, num_steps: int) -> int | None:
    """An `Interval` in steps of a job that takes `num_steps`; None stays None. A share is at least one step."""
    if interval is None or interval >= 1:
        return None if interval is None else int(interval)
    # 1/3 of 30 steps is 10 steps, though 30 * (1/3) may be a hair above
    return max(1, math.ceil(interval * num_steps - 1e-9))
