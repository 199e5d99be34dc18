"""The memory plan of a run: what the settings leave open is decided here, before any weights load."""

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
"""Times the free memory: what needs more is refused, since a kernel that runs out of memory kills without a word."""


def _plan(config: RunConfig, data: Sequence[Prepared]) -> tuple[Planner, MemoryPlan] | Exception:
    """The plan and its planner; or why there is none."""
    try:
        planner = planner_of(config, data)
        return planner, choose(planner, config.micro_batch_tokens, config.model.activation_checkpointing)
    except LowrankError:
        raise
    except Exception as error:  # whatever a model's own code does on fake tensors: a plan is no condition of a run
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


def at_once(config: RunConfig) -> int:
    """Jobs that begin at the same time."""
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
    """The settings with every `auto` about memory decided, and the plan; said in one line.

    It is of as many jobs as train at the same time: of a sweep's candidates as many as fit, the heaviest counted, and
    `max_concurrent_jobs` says how many those are; `capacity`: how many they were, where a run goes on. Such a run
    (`checkpoint`: its settings) takes what was decided when it began, so that every bit is the same. ConfigError where
    the run surely does not fit, with the changes that would make it fit. A model that cannot be simulated is run
    without a plan.
    """
    number = min(len(config.jobs), capacity or at_once(config))
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
    most = number if waiting and number < len(config.jobs) else at_once(config)
    if waiting and number < len(config.jobs):
        report(Notice(f"{number} candidates fit into memory at the same time, {waiting} wait for their slots"))
    return planned.model_copy(update={"max_concurrent_jobs": most}), plan


def _heaviest(config: RunConfig, number: int) -> list[int]:
    """Places of the jobs with the largest adapters, by rank, in the order of the jobs."""
    if number >= len(config.jobs):
        return list(range(len(config.jobs)))
    order = sorted(range(len(config.jobs)), key=lambda place: -getattr(config.jobs[place].adapter, "rank", 0))
    return sorted(order[:number])


def refuse_too_many(config: RunConfig, data: Sequence[Prepared]) -> None:
    """ConfigError for a sweep with more combinations than anybody means, with the time that they would take here."""
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
    """`, about 3 days to the end of all`; nothing where that cannot be found out."""
    try:
        planner = planner_of(config, data)
        speed = calibrate(planner.memory, choose(planner, config.micro_batch_tokens, "none"))
        seconds = number * tokens_to_train(config.jobs[:1], data[:1]) / speed.tokens_per_second
    except Exception:  # a model that cannot be simulated: the number alone says enough
        return ""
    return f", about {duration(seconds)} on this machine if all are trained to their end"


class MemoryBudget:
    """Whether other jobs than those a run was planned for would fit, while it trains."""

    def __init__(self, config: RunConfig, plan: MemoryPlan | None) -> None:
        """`config`: with what the plan decided; without a plan everything is said to fit."""
        self._config, self._plan = config, plan

    def for_jobs(self, jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> bool:
        """By the plan's own numbers for the process and the machine: what is free now says nothing, since the base is
        loaded."""
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
    """What plans this run, for its heaviest optimizer steps, on this machine or another. ConfigError for what its base
    cannot do."""
    saved = saved_wrapper(read_config(config.model))
    if saved is not None:
        raise_all(ConfigError, f"{config.model.path} is {saved.title}", [*wrapper_conflicts(config)])
    memory = StepMemory(config.model, planned_jobs(config, data), lanes_in(config), placed_in(config))
    return Planner(config.model, memory, machine)


def placed_in(config: RunConfig) -> Placed:
    """How the base is kept, as far as the settings say; of the ranks that a launcher has started, with their number."""
    devices = config.devices if isinstance(config.devices, int) and config.devices > 1 else processes_here()
    if devices == 1 and config.base != STREAMED:
        return Placed()
    size = ranks_of_a_machine(devices) if config.shard_size == "auto" else config.shard_size
    return Placed(config.base, devices, size)


def lanes_in(config: RunConfig) -> int:
    """Parts in which a step is computed, as far as the settings say."""
    return config.lanes if isinstance(config.lanes, int) else 1


def planned_jobs(config: RunConfig, data: Sequence[Prepared]) -> list[PlannedJob]:
    """What of the jobs decides about memory. ModelError for adapters to go on from that fit another base than this."""
    planned = []
    for job, own in zip(config.jobs, data):
        adapter = job.adapter if job.tuning == "adapter" else None
        if adapter is not None and adapter.path is not None:
            header = read_adapter_header(Path(adapter.path))
            refuse_before_loading(header, config.model)
            saved = load_adapter(Path(adapter.path)) if header.base_tensors or header.copies else header
            adapter = on_base_of(saved, config.model).config  # with what it brings of the base, which is trained too
        objective, step = job.objective.build(), own.train.heaviest_step()
        if needs(objective, "rollouts"):
            step = worst_case_step(objective, step)
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
        raise ConfigError(f"{text}\n  - ignore_memory_plan: true starts it all the same")
    report(Notice(text, level="warning"))


def open_settings(config: RunConfig) -> dict[str, Any]:
    """What a change may be about, as it stands in the settings."""
    return {
        "activation_checkpointing": config.model.activation_checkpointing,
        "base": config.base,
        "micro_batch_tokens": config.micro_batch_tokens,
        "max_length": max(job.data.max_length for job in config.jobs),
    }
