"""The memory plan of a run, which decides the settings that are `auto`, before any weights load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.checkpoints.peft_layout import load_adapter, read_adapter_header
from lowrank.config import JobConfig, RunConfig
from lowrank.config.checks import wrapper_conflicts
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError, LowrankError, first_line, raise_all
from lowrank.models.layer_wrappers import saved_wrapper
from lowrank.objectives import needs
from lowrank.pipelines.adapter_on_base import on_base_of, refuse_before_loading
from lowrank.planning.changes import changes_that_fit
from lowrank.planning.choose import TOKENS, choose
from lowrank.planning.machine import Machine
from lowrank.planning.memory import StepMemory
from lowrank.planning.placed import STREAMED, Placed
from lowrank.planning.plan import MARGIN, MemoryPlan, Planner, describe_planned_media, one_line
from lowrank.planning.simulation import PlannedJob, read_config
from lowrank.planning.speed import calibrate
from lowrank.ranks import processes_here, ranks_of_a_machine
from lowrank.report.events import Event, Notice
from lowrank.report.formatting import duration, gigabytes
from lowrank.search.candidates import num_combinations, too_many, trials_among
from lowrank.train.rollouts import worst_case_step

_SURELY = 1.1
"""A run that needs more than this times the free memory is refused, since a kernel that runs out of memory kills the
process without a message."""


def _plan(config: RunConfig, data: Sequence[Prepared]) -> tuple[Planner, MemoryPlan] | Exception:
    """Return the plan and its planner, or the error for which there is none."""
    try:
        planner = planner_of(config, data)
        return planner, choose(planner, config.micro_batch_tokens, config.model.activation_checkpointing)
    except LowrankError:
        raise
    except Exception as error:  # a model's own code may fail on fake tensors; a run needs no plan
        return error


def _report_plan(
    config: RunConfig, found: tuple[Planner, MemoryPlan] | Exception, report: Callable[[Event], None]
) -> tuple[RunConfig, MemoryPlan | None]:
    if isinstance(found, Exception):
        report(Notice(f"the memory of this model could not be planned ({type(found).__name__}: {first_line(found)})"))
        return _decided(config, tokens_of(config), "none"), None
    planner, plan = found
    report(Notice(one_line(plan)))
    if plan.pictures is not None:
        report(Notice(describe_planned_media(plan.pictures)))
    if not plan.fits:
        _warn_or_refuse(config, planner, plan, report)
    return _decided(config, plan.micro_batch_tokens, plan.activation_checkpointing), plan


def concurrent_jobs(config: RunConfig) -> int:
    """Return how many jobs train at the same time, as far as the settings say."""
    most = config.max_concurrent_jobs
    if not isinstance(most, str):
        return most
    return len(config.jobs) if config.sweep is None else _trials(config)


def _trials(config: RunConfig) -> int:
    assert config.sweep is not None
    return trials_among(config.sweep, {job.name for job in config.jobs})


def with_slots(
    config: RunConfig,
    data: Sequence[Prepared],
    checkpoint: Mapping[str, Any] | None,
    report: Callable[[Event], None],
    capacity: int | None = None,
) -> tuple[RunConfig, MemoryPlan | None]:
    """Return the settings with every `auto` about memory decided, and the plan, which is reported in one line.

    The plan is for the jobs that train at the same time. Of a sweep's candidates these are as many as fit, and
    `max_concurrent_jobs` becomes that number; the plan counts the heaviest. A resumed run (`checkpoint`: its settings,
    `capacity`: its number of concurrent jobs) takes what was decided when it began, so that its bits are the same.
    Without a plan (None) a model that cannot be simulated runs. ConfigError for a run that surely does not fit, with
    the changes that would make it fit."""
    number = min(len(config.jobs), capacity or concurrent_jobs(config))
    halves = config.sweep is not None and config.max_concurrent_jobs == "auto" and checkpoint is None
    while True:  # each number is planned once: on fake tensors that takes seconds
        chosen = _heaviest(config, number)
        part = _as_before(config.model_copy(update={"jobs": tuple(config.jobs[n] for n in chosen)}), checkpoint)
        found = _plan(part, [data[n] for n in chosen])
        if not halves or number == 1 or isinstance(found, Exception) or found[1].fits:
            break
        number = (number + 1) // 2
    planned, plan = _report_plan(part, found, report)
    planned = planned.model_copy(update={"jobs": config.jobs})
    if not halves:
        return planned, plan
    waiting = _trials(config) - number
    most = number if waiting and number < len(config.jobs) else concurrent_jobs(config)
    if waiting and number < len(config.jobs):
        report(Notice(f"{number} candidates fit into memory at the same time, {waiting} wait for their slots"))
    return planned.model_copy(update={"max_concurrent_jobs": most}), plan


def _heaviest(config: RunConfig, number: int) -> list[int]:
    """Return the indices of the `number` jobs with the largest adapters, by rank, in the order of the jobs."""
    if number >= len(config.jobs):
        return list(range(len(config.jobs)))
    order = sorted(range(len(config.jobs)), key=lambda index: -getattr(config.jobs[index].adapter, "rank", 0))
    return sorted(order[:number])


def refuse_too_many(config: RunConfig, data: Sequence[Prepared]) -> None:
    """Refuse a sweep with too many combinations: ConfigError, with the time that they would take on this machine."""
    sweep = config.sweep
    if sweep is None or not too_many(sweep):
        return
    number = num_combinations(sweep)
    text = (
        f"sweep: these are {number:,} combinations{_time_of(config, data, number)}; say how many of them to try: "
        "sweep.max_trials: 32"
    )
    raise ConfigError(text)


def _time_of(config: RunConfig, data: Sequence[Prepared], number: int) -> str:
    """Return a text such as ", about 3 days on this machine ..."; empty where the time cannot be estimated."""
    try:
        planner = planner_of(config, data)
        speed = calibrate(planner.memory, choose(planner, config.micro_batch_tokens, "none"))
        seconds = number * tokens_to_train(config.jobs[:1], data[:1]) / speed.tokens_per_second
    except Exception:  # a model that cannot be simulated: the number alone is enough
        return ""
    return f", about {duration(seconds)} on this machine if all are trained to their end"


class MemoryBudget:
    """Decides whether other jobs than those planned would fit into memory, while a run trains."""

    def __init__(self, config: RunConfig, plan: MemoryPlan | None) -> None:
        """`config`: the planned settings. Without a plan everything fits."""
        self._config, self._plan = config, plan

    def for_jobs(self, jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> bool:
        """Return whether these jobs fit together, by the plan's numbers for the process and the machine. What is free
        now is no measure, since the base is loaded."""
        if self._plan is None:
            return True
        config = self._config.model_copy(update={"jobs": tuple(jobs)})
        try:
            memory = StepMemory(config.model, planned_jobs(config, data), lanes_in(config), placed_in(config))
            step = memory.step(self._plan.micro_batch_tokens, self._plan.activation_checkpointing)
        except LowrankError:
            raise
        except Exception:  # as in _plan
            return True
        return step.total + self._plan.process <= MARGIN * self._plan.available


def planner_of(config: RunConfig, data: Sequence[Prepared], machine: Machine | None = None) -> Planner:
    """Return the planner of this run, for its heaviest optimizer steps, on `machine` (None: this one). ConfigError for
    settings that its base does not support."""
    saved = saved_wrapper(read_config(config.model))
    if saved is not None:
        raise_all(ConfigError, f"{config.model.path} is {saved.title}", [*wrapper_conflicts(config)])
    memory = StepMemory(config.model, planned_jobs(config, data), lanes_in(config), placed_in(config))
    return Planner(config.model, memory, machine)


def placed_in(config: RunConfig) -> Placed:
    """Return how the base is placed on the devices: those of the settings, else the ranks that a launcher has
    started."""
    devices = config.devices if isinstance(config.devices, int) and config.devices > 1 else processes_here()
    if devices == 1 and config.base != STREAMED:
        return Placed()
    size = ranks_of_a_machine(devices) if config.shard_size == "auto" else config.shard_size
    return Placed(config.base, devices, size)


def lanes_in(config: RunConfig) -> int:
    """Return the number of lanes, 1 while it is `auto`."""
    return config.lanes if isinstance(config.lanes, int) else 1


def planned_jobs(config: RunConfig, data: Sequence[Prepared]) -> list[PlannedJob]:
    """Return what the memory of each job depends on. ModelError for an `adapter.path` whose adapter does not fit the
    base."""
    planned = []
    for job, prepared in zip(config.jobs, data):
        adapter = job.adapter if job.tuning == "adapter" else None
        if adapter is not None and adapter.path is not None:
            header = read_adapter_header(Path(adapter.path))
            refuse_before_loading(header, config.model)
            saved = load_adapter(Path(adapter.path)) if header.base_tensors or header.copies else header
            adapter = on_base_of(
                saved, config.model
            ).config  # with the base's weights in its file, which are trained too
        objective, step = job.objective.build(), prepared.train.heaviest_step()
        if needs(objective, "rollouts"):
            step = worst_case_step(objective, step)
        freeze = job.freeze if job.tuning == "freeze" else None
        alpha = job.neftune_noise_alpha or 0.0
        tokens = prepared.train.tokens_of_steps()[: job.max_steps]
        planned.append(PlannedJob(adapter, objective, job.optimizer, step, alpha, freeze, tokens))
    return planned


def tokens_of(config: RunConfig) -> int:
    """Return `micro_batch_tokens`; while it is `auto`, the first number that would be tried."""
    return TOKENS[0] if isinstance(config.micro_batch_tokens, str) else config.micro_batch_tokens


def tokens_to_train(jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> int:
    """Return how many tokens go through the base until every job is done."""
    total = 0.0
    for job, prepared in zip(jobs, data):
        step = sum(map(len, prepared.train.heaviest_step()))
        epoch = prepared.train.state().get("tokens")
        if job.max_steps is not None:
            per_epoch = prepared.train.steps_per_epoch
            total += job.max_steps * (epoch / per_epoch if epoch and per_epoch else step)
        else:
            total += job.num_train_epochs * (epoch or 0)
    return int(total)


def _as_before(config: RunConfig, checkpoint: Mapping[str, Any] | None) -> RunConfig:
    if checkpoint is None:
        return config
    tokens, activation_checkpointing = config.micro_batch_tokens, config.model.activation_checkpointing
    if tokens == "auto":
        tokens = checkpoint.get("micro_batch_tokens", tokens)
    if activation_checkpointing == "auto":
        activation_checkpointing = checkpoint["model"].get("activation_checkpointing", activation_checkpointing)
    return _decided(config, tokens, activation_checkpointing)


def _decided(config: RunConfig, tokens: int | str, activation_checkpointing: str | int) -> RunConfig:
    if activation_checkpointing == config.model.activation_checkpointing and tokens == config.micro_batch_tokens:
        return config
    model = config.model.model_copy(update={"activation_checkpointing": activation_checkpointing})
    return config.model_copy(update={"micro_batch_tokens": tokens, "model": model})


def _warn_or_refuse(config: RunConfig, planner: Planner, plan: MemoryPlan, report: Callable[[Event], None]) -> None:
    text = f"this run needs about {gigabytes(plan.peak)}, and {gigabytes(plan.available)} are free on {plan.device}"
    for change in changes_that_fit(planner, plan, open_settings(config)):
        text += f"\n  - {change}"
    surely = plan.peak > _SURELY * plan.available
    if surely and not config.ignore_memory_plan:
        raise ConfigError(f"{text}\n  - ignore_memory_plan: true starts it anyway")
    report(Notice(text, level="warning"))


def open_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a suggested change may change, with their values."""
    return {
        "activation_checkpointing": config.model.activation_checkpointing,
        "base": config.base,
        "micro_batch_tokens": config.micro_batch_tokens,
        "max_length": max(job.data.max_length for job in config.jobs),
    }
