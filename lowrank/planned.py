"""A run and its memory plan: what is left open in the settings is decided here, before any weights load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.config import JobConfig, RunConfig
from lowrank.config.checks import depth_conflicts
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError, LowrankError, raise_all
from lowrank.models.depths import KEY
from lowrank.objectives import needs
from lowrank.planning.changes import changes_that_fit
from lowrank.planning.choose import TOKENS, choose
from lowrank.planning.memory import StepMemory
from lowrank.planning.plan import Plan, Planner
from lowrank.planning.simulation import PlannedJob, read_config
from lowrank.planning.wording import gigabytes, one_line
from lowrank.train.events import Event, Notice
from lowrank.train.rollouts import rehearsal

_SURELY = 1.1
"""Times the free memory: what needs more is refused, since a kernel that runs out of memory kills without a word."""


def with_plan(
    config: RunConfig,
    data: Sequence[Prepared],
    checkpoint: Mapping[str, Any] | None,
    report: Callable[[Event], None],
) -> tuple[RunConfig, Plan | None]:
    """The settings with every `auto` about memory decided, and the plan; said in one line.

    A run that goes on (`checkpoint`: its settings) takes what was decided when it began, so that every bit is the
    same. ConfigError where the run surely does not fit, with the changes that would make it fit. A model that
    cannot be simulated is run without a plan.
    """
    config = _as_before(config, checkpoint)
    try:
        planner = planner_of(config, data)
        plan = choose(planner, config.micro_batch_tokens, config.model.recompute)
    except LowrankError:
        raise
    except Exception as error:  # whatever a model's own code does on fake tensors: a plan is no condition of a run
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        report(Notice(f"the memory of this model could not be planned ({type(error).__name__}: {reason})"))
        return _decided(config, tokens_of(config), "none"), None
    report(Notice(one_line(plan)))
    if not plan.fits:
        _warn_or_refuse(config, planner, plan, report)
    return _decided(config, plan.micro_batch_tokens, plan.recompute), plan


def planner_of(config: RunConfig, data: Sequence[Prepared]) -> Planner:
    """What plans this run, for its heaviest optimiser steps. ConfigError for what its base cannot do."""
    if getattr(read_config(config.model), KEY, None) is not None:
        raise_all(ConfigError, f"{config.model.path} is a mixture of depths", [*depth_conflicts(config)])
    return Planner(config.model, StepMemory(config.model, planned_jobs(config.jobs, data)))


def planned_jobs(jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> list[PlannedJob]:
    """What of the jobs decides about memory."""
    planned = []
    for job, own in zip(jobs, data):
        adapter = job.adapter if job.tuning == "adapter" else None
        if adapter is not None and adapter.path is not None:
            adapter = load_adapter(Path(adapter.path)).config
        objective, step = job.objective.build(), own.train.heaviest_step()
        if needs(objective, "rollouts"):
            step = rehearsal(objective, step)
        freeze = job.freeze if job.tuning == "freeze" else None
        alpha = job.neftune_noise_alpha or 0.0
        tokens = own.train.tokens_of_steps()[: job.max_steps]
        planned.append(PlannedJob(adapter, objective, job.optimizer, step, alpha, freeze, tokens))
    return planned


def tokens_of(config: RunConfig) -> int:
    """Tokens of a forward pass; where nothing was decided, the first that `auto` would try."""
    return TOKENS[0] if isinstance(config.micro_batch_tokens, str) else config.micro_batch_tokens


def tokens_to_train(jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> int:
    """Tokens that go through the base until every job is done."""
    total = 0.0
    for job, own in zip(jobs, data):
        step = sum(map(len, own.train.heaviest_step()))
        epoch = own.train.state().get("tokens")
        if job.max_steps is not None:
            per_epoch = own.train.steps_per_epoch
            total += job.max_steps * (epoch / per_epoch if epoch and per_epoch else step)
        else:
            total += job.num_train_epochs * (epoch or 0)
    return int(total)


def _as_before(config: RunConfig, checkpoint: Mapping[str, Any] | None) -> RunConfig:
    if checkpoint is None:
        return config
    tokens, recompute = config.micro_batch_tokens, config.model.recompute
    if tokens == "auto":
        tokens = checkpoint.get("micro_batch_tokens", tokens)
    if recompute == "auto":
        recompute = checkpoint["model"].get("recompute", recompute)
    return _decided(config, tokens, recompute)


def _decided(config: RunConfig, tokens: int | str, recompute: str | int) -> RunConfig:
    if recompute == config.model.recompute and tokens == config.micro_batch_tokens:
        return config
    model = config.model.model_copy(update={"recompute": recompute})
    return config.model_copy(update={"micro_batch_tokens": tokens, "model": model})


def _warn_or_refuse(config: RunConfig, planner: Planner, plan: Plan, report: Callable[[Event], None]) -> None:
    text = f"this run needs about {gigabytes(plan.peak)}, and {gigabytes(plan.available)} are free on {plan.device}"
    for change in changes_that_fit(planner, plan, open_settings(config)):
        text += f"\n  - {change}"
    surely = plan.peak > _SURELY * plan.available
    if surely and not config.ignore_memory_plan:
        raise ConfigError(f"{text}\n  - ignore_memory_plan: true starts it all the same")
    report(Notice(text, level="warning"))


def open_settings(config: RunConfig) -> dict[str, Any]:
    """What a change may be about, as it stands in the settings."""
    return {
        "recompute": config.model.recompute,
        "micro_batch_tokens": config.micro_batch_tokens,
        "max_length": max(job.data.max_length for job in config.jobs),
    }
