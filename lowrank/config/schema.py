"""The settings of a run: one base model, and one or more jobs on it.

A job is one adapter (or the whole base, with `tuning: full`) with its data, objective and optimizer.
What a job needs may stand at the top level, where it holds for every job, or in an entry of `jobs`,
where it overrides the top. After reading, `RunConfig.jobs` is never empty and every job is complete.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, Field, ValidationError, model_validator

import lowrank.data.config
import lowrank.models.config
from lowrank.adapters.variants import AdapterConfig
from lowrank.config.checks import conflicts
from lowrank.config.jobs import complete_jobs, spell_out
from lowrank.config.problems import SettingsConflict, error_lines
from lowrank.config.share import PATTERN as SHARE_PATTERN
from lowrank.config.sweeps import with_candidates
from lowrank.errors import did_you_mean
from lowrank.models.config import FreezeConfig
from lowrank.objectives import ObjectiveConfig
from lowrank.report.reporters.trackers import known_trackers
from lowrank.search.config import SweepConfig
from lowrank.settings import Auto, NonNegative, Positive, Settings
from lowrank.third_party import names_code
from lowrank.train.optimizers import OptimizerConfig
from lowrank.train.schedule import ScheduleConfig

Interval = Union[Positive, Annotated[float, Field(gt=0, lt=1)]]  # noqa: UP007 (read at run time on Python 3.10)
"""A number of optimizer steps, or, below 1, a share of the run."""

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


def _known_reporter(name: str) -> str:
    known = known_trackers()
    if name not in known and not names_code(name):
        raise ValueError(f"{name!r} is not known{did_you_mean(name, known)}; or your own, my_module:MyReporter")
    return name


def _at_home(path: Path) -> Path:
    """`~/runs` and `$HOME/runs` as a shell would have it; a folder named `~` is in nobody's mind."""
    return Path(os.path.expandvars(path)).expanduser() if str(path).startswith(("~", "$")) else path


ReporterName = Annotated[str, AfterValidator(_known_reporter)]


class JobSettings(Settings):
    """What may stand at the top level for every job, or in an entry of `jobs` for one."""

    data: lowrank.data.config.DataConfig = Field(default_factory=lowrank.data.config.DataConfig)
    """What is learned from."""
    adapter: AdapterConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """The low-rank update that is trained; only its type stands for `{type: ...}`."""
    objective: ObjectiveConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """What is minimized."""
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
    """Optimizer steps, instead of `num_train_epochs`."""
    early_stopping_patience: Positive | None = None
    """Stop the job after this many evaluations in a row without a gain in `eval_metric`."""
    eval_metric: EvalMetric = "loss"
    """What decides which adapter is kept as `best`, and early stopping. loss: the held-out loss. The others compare
    generated answers to held-out questions with those in the data, higher is better; of equal ones the lower loss is
    the better. All but exact_match need `pip install 'lowrank-llm[metrics]'`."""
    eval_generate_samples: Positive | None = 64
    """Held-out questions that are answered at each evaluation for `eval_metric`, spread over the held-out rows; null:
    all."""
    eval_max_new_tokens: Positive = 256
    """Tokens of such an answer at the most."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Strength of NEFTune noise on the input embeddings while training (arXiv:2310.05914); 5 is usual. Left out: no
    noise."""

    @classmethod
    def problems_of(cls, error: ValidationError, values: Mapping[str, Any]) -> list[str]:
        """What pydantic refused in the `values` of one, a line for each problem."""
        return error_lines(error, spell_out(values), cls)


class JobConfig(JobSettings):
    """One job, complete: the settings of docs/settings.md."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        return spell_out(value) if isinstance(value, dict) else value

    @property
    def trains_base(self) -> bool:
        """Its result is a whole model, not an adapter."""
        return self.tuning != "adapter"

    name: str = Field(max_length=100, pattern=r"^\w[\w.+=-]*$")
    """What the job is called; also its folder in `output_dir`."""


class RunConfig(JobSettings):
    """A run: the settings of docs/settings.md."""

    model: lowrank.models.config.ModelConfig
    """The base; only its path stands for `{path: ...}`."""
    jobs: tuple[JobConfig, ...] = ()
    """Jobs trained at the same time on the one base. An entry has a `name` and whatever differs from the top level; a
    group of settings is overridden setting by setting. Left out: one job named `default`."""
    sweep: SweepConfig | None = None
    """Candidates that differ in some settings, as the jobs of the run: only those that are worth it are trained to
    their end, and the best is kept in `best` (docs/sweeps.md). In the place of `jobs`."""
    output_dir: Annotated[Path, AfterValidator(_at_home)]
    """The run folder: `summary.json`, `metrics.jsonl`, `loss.png` and one folder per job. Relative to the current
    directory."""
    save_steps: Interval | None = 500
    """Optimizer steps between checkpoints, or a share of the run (0.1: ten times); null: only at the end."""
    save_total_limit: Positive | None = 1
    """Keep this many checkpoints; null: all. A job's best and last adapters are always kept."""
    eval_steps: Interval | None = 0.1
    """Optimizer steps between evaluations on the held-out rows, or a share of the job; null: only at the end."""
    logging_steps: Interval = 10
    """Optimizer steps between logged losses, or a share of the job."""
    micro_batch_tokens: Auto | Positive = "auto"
    """Tokens of one forward pass over all jobs together. Smaller saves memory; the result stays the same. auto: 4096,
    or as many as fit into memory."""
    max_concurrent_jobs: Auto | Positive = "auto"
    """Jobs that train at the same time; the others wait for a slot. auto: all of `jobs`, and of those that are added
    while it trains, and of a sweep's candidates, as many as fit into memory."""
    ignore_memory_plan: bool = False
    """Start even if the run needs more memory than is free; without, a run that surely does not fit is refused."""
    devices: Positive | Literal["all"] = 1
    """GPUs of this machine that the run uses, each by a process of its own; all: every one that CUDA_VISIBLE_DEVICES
    leaves. With `model.device: cpu`, or where there is no GPU, so many processes (docs/distributed.md)."""
    parallelism: Literal["auto", "jobs", "data"] = "auto"
    """What is dealt to the devices. jobs: whole jobs, and nothing travels between devices. data: every optimizer step
    of all jobs; gradients travel once a step. auto: jobs where there are as many as devices, else data."""
    lanes: Auto | Positive = "auto"
    """Parts, a power of two, in which each optimizer step is computed; devices share them, and the results are the same
    bits on any number of devices with the same lanes. auto: as many as there are devices when the run begins."""
    base: Literal["replicated", "sharded", "sharded_offload", "streamed"] = "replicated"
    """How devices hold the frozen base. replicated: each the whole of it. sharded: each a part, gathered layer by layer
    while it computes (FSDP2), twice a pass, so between devices with fast links. sharded_offload: the same, the parts
    waiting in host memory. streamed: in host memory, each layer copied to the device while the one before computes. The
    results are the same bits."""
    shard_size: Auto | Positive = "auto"
    """With a sharded base: devices that hold it once between them; other groups hold copies. auto: those of one machine
    each."""
    share: Annotated[str, Field(pattern=SHARE_PATTERN)] | None = None
    """3/16: of the jobs, dealt to 16 machines by their work, train the third's, in `shares/` of `output_dir`; `lowrank
    report` merges what comes of all. auto: as Slurm, torchrun or SkyPilot say in the environment. Left out: all."""
    report_to: tuple[ReporterName, ...] = ()
    """Where to send metrics besides `metrics.jsonl`: tensorboard, wandb, mlflow, swanlab, or a reporter of your own,
    `my_module:MyReporter` (see docs/third-party-code.md)."""
    resume: bool = False
    """Go on from the last checkpoint in `output_dir`; if there is none, start from the beginning."""
    overwrite: bool = False
    """Delete the run that is in `output_dir`."""

    @model_validator(mode="before")
    @classmethod
    def _complete_jobs(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = with_candidates(spell_out(value))
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
