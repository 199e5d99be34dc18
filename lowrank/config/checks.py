"""Settings that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lowrank.adapters.prompts import PromptSettings
from lowrank.checkpoints.run_folder import RUN_FILES, STOP
from lowrank.config.own_types import adapter_problems, objective_problems, optimizer_problems
from lowrank.models.layer_wrappers import wrapping_conflicts
from lowrank.objectives import needs
from lowrank.objectives.rollout import RolloutSettings
from lowrank.objectives.sft import SFTConfig
from lowrank.records import Text
from lowrank.search.candidates import first_candidates
from lowrank.search.config import SweepConfig
from lowrank.settings import Settings

if TYPE_CHECKING:
    from lowrank.config.schema import JobConfig, RunConfig

RESERVED_NAMES = (*RUN_FILES, STOP, "checkpoint")
"""Names in the run folder that are not jobs."""


_DEVICES = ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)))
"""What Windows takes for devices, whatever follows a dot."""


def conflicts(config: RunConfig) -> list[str]:
    """Everything that cannot be done as asked, one line each, with the way out."""
    found, unusable = list(_name_conflicts(config)), set[int]()
    for index, job in enumerate(config.jobs):
        of_objective = objective_problems(job)
        own = [*of_objective, *adapter_problems(job), *optimizer_problems(job)]
        found.extend(f"{place_of(config, index)}{problem}" for problem in own)
        if of_objective:
            unusable.add(index)
    if unusable:  # whatever else is wrong is found beside a plain objective
        jobs = [
            job.model_copy(update={"objective": SFTConfig()}) if index in unusable else job
            for index, job in enumerate(config.jobs)
        ]
        config = config.model_copy(update={"jobs": tuple(jobs)})
    found.extend(_run_conflicts(config))
    for index, job in enumerate(config.jobs):
        found.extend(f"{place_of(config, index)}{problem}" for problem in _job_conflicts(config, job))
    return found


def has_eval(job: JobConfig) -> bool:
    """Whether the job has held-out rows."""
    return bool(job.data.eval) or job.data.validation_split > 0


def place_of(config: RunConfig, index: int) -> str:
    """What stands before a job's settings in messages; nothing where it is the only job."""
    return f"jobs.{index}." if len(config.jobs) > 1 else ""


def is_set(settings: Settings, name: str) -> bool:
    """Whether somebody gave it a value other than its default."""
    default = type(settings).model_fields[name].get_default(call_default_factory=True)
    return name in settings.model_fields_set and getattr(settings, name) != default


def _name_conflicts(config: RunConfig) -> Iterator[str]:
    # compared without case: two such folders are one on macOS and Windows
    count = Counter(job.name.lower() for job in config.jobs)
    for index, job in enumerate(config.jobs):
        name = job.name.lower()
        if count[name] > 1:
            yield f"jobs.{index}.name: {job.name!r} is used more than once; give every job its own name"
        if name in RESERVED_NAMES or name.endswith(".") or name.partition(".")[0] in _DEVICES:
            yield f"jobs.{index}.name: {job.name!r} cannot be the name of a folder in output_dir; choose another"


def sweep_metric(config: RunConfig) -> str:
    """What the candidates of a sweep are compared by."""
    assert config.sweep is not None
    return config.sweep.metric or config.jobs[0].eval_metric


def _sweep_conflicts(config: RunConfig, sweep: SweepConfig) -> Iterator[str]:
    names = [job.name for job in config.jobs]
    expected = [candidate.name for candidate in first_candidates(sweep) if candidate.name in names]  # a share has some
    if not expected or names[: len(expected)] != expected:
        yield "sweep: its candidates are the jobs, so jobs has no meaning beside it; leave one of the two out"
        return
    reported = sorted({job.eval_metric for job in config.jobs})
    metric = sweep_metric(config)
    if reported != [metric]:
        yield (
            f"sweep.metric: {metric}: the jobs report {', '.join(reported)}; set eval_metric: {metric} for all of "
            "them, or leave sweep.metric out"
        )
    if sweep.search != "none" and not all(has_eval(job) for job in config.jobs):
        yield (
            f"sweep.search: {sweep.search} compares candidates on held-out rows; give data.eval or "
            "data.validation_split, or set search: none"
        )
    objectives = {type(job.objective) for job in config.jobs}
    if metric == "loss" and len(objectives) > 1:
        yield "sweep: losses of different objectives do not compare; set eval_metric to a metric of generated answers"


def _run_conflicts(config: RunConfig) -> Iterator[str]:
    if config.sweep is not None:
        yield from _sweep_conflicts(config, config.sweep)
    full = [job.name for job in config.jobs if job.trains_base]
    if full and len(config.jobs) > 1:
        yield (
            f"tuning: job {full[0]!r} trains the base's own parameters, so no other job can use that base; "
            "run it alone, or set tuning: adapter"
        )
    if config.share is not None and config.devices != 1:
        yield "share and devices: a share is trained on one device; give each device of each machine a share of its own"
    if config.share is not None and config.sweep is not None and config.sweep.sampler == "optuna":
        yield (
            "share: sweep.sampler: optuna draws one candidate after another, by what is known of all before; set "
            "sampler: random, or leave share out"
        )
    if config.base != "replicated":
        yield from _placement_conflicts(config)
    if config.shard_size != "auto" and not config.base.startswith("sharded"):
        yield f"shard_size: base: {config.base} is not cut in parts; set base: sharded, or leave shard_size out"
    if config.resume and config.overwrite:
        yield "resume and overwrite: one goes on with the run in output_dir, the other deletes it; set only one"
    if config.eval_steps is not None and is_set(config, "eval_steps") and not any(has_eval(job) for job in config.jobs):
        yield "eval_steps: there are no held-out rows; give data.eval or data.validation_split, or leave eval_steps out"
    if config.model.shift_attn is not None and config.model.attention == "padded":
        yield "model.shift_attn: only where attention is packed; set model.attention: auto, or leave shift_attn out"
    if config.model.cache_vision_features and config.base.startswith("sharded"):
        yield (
            f"model.cache_vision_features: with base: {config.base} no device has the whole tower to tell it from "
            "others; set base: replicated, or leave cache_vision_features out"
        )
    if config.model.layer_wrapper is not None:
        yield from wrapper_conflicts(config)
    if config.model.random_init is not None and any(job.tuning != "full" for job in config.jobs):
        yield "model.random_init: random weights are nothing to put an adapter on; set tuning: full"
    if config.model.storage.type != "dense" and full:
        kind = next(job.tuning for job in config.jobs if job.trains_base)
        yield f"tuning: {kind} needs model.storage.type: dense, not {config.model.storage.type!r}"


def _placement_conflicts(config: RunConfig) -> Iterator[str]:
    """What cannot be done with a base that is not whole on every device."""
    base = f"base: {config.base}"
    whole = "set base: replicated"
    full = next((job for job in config.jobs if job.trains_base), None)
    if full is not None:
        yield (
            f"{base}: tuning: {full.tuning} trains the base's own parameters, which must be whole; {whole}, or tuning: "
            "adapter"
        )
    if config.base != "streamed" and (config.parallelism == "jobs" or config.share is not None):
        yield f"{base}: devices that train different jobs share no base; {whole}, or parallelism: data without share"
    if config.model.activation_checkpointing == "sqrt":
        yield f"{base}: model.activation_checkpointing: sqrt holds layers together that are let go one by one; set full"
    for job in config.jobs if config.base != "streamed" else ():
        name = f"job {job.name}: " if len(config.jobs) > 1 else ""
        if isinstance(job.objective, RolloutSettings) or job.eval_metric != "loss":
            what = "eval_metric" if job.eval_metric != "loss" else f"objective {job.objective.type}"
            yield (
                f"{base}: {name}{what} generates answers, each device its own for as long as they last, and a shared "
                f"base needs all devices in step; {whole}"
            )
        objective = job.objective.build()
        if needs(objective, "token_scores") or needs(objective, "reference_logits"):
            yield f"{base}: {name}this loss computes with the head again in its backward pass; {whole}"
        adapter = job.adapter
        if job.tuning == "adapter" and (adapter.modules_to_save or adapter.trainable_token_indices):
            yield (
                f"{base}: {name}adapter.modules_to_save and trainable_token_indices train copies of weights that no "
                f"device holds whole; {whole}, or leave them out"
            )


def wrapper_conflicts(config: RunConfig) -> Iterator[str]:
    """What cannot be done where decoder layers are wrapped: as asked for, or as the base's config.json has it."""
    job, model = config.jobs[0], config.model
    return wrapping_conflicts(
        trains_all=job.tuning == "full",
        storage=model.storage.type,
        packed=model.attention != "padded" and model.shift_attn is None,
        compares=job.objective.type if _looks_twice(job) else None,
    )


def _job_conflicts(config: RunConfig, job: JobConfig) -> Iterator[str]:
    if not job.data.train:
        yield "data.train: nothing to learn from; give a file, a folder, a hub name, or in Python rows"
    if job.data.streaming and job.max_steps is None:
        yield "max_steps: needed with data.streaming, since the number of rows is not known beforehand"
    if job.data.streaming and job.trains_base and needs(job.objective.build(), "reference"):
        yield (
            f"data.streaming: objective {job.objective.type} compares with the base as it was, which tuning: "
            f"{job.tuning} changes while the stream is read; leave streaming out, or set tuning: adapter"
        )
    if isinstance(job.objective, RolloutSettings):
        yield from _rollout_conflicts(job, job.objective)
    if config.model.shift_attn is not None and _looks_twice(job):
        yield (
            f"model.shift_attn: objective {job.objective.type} compares log-probabilities in training with others that "
            "whole attention gives, so it would learn the difference between the two; leave shift_attn out"
        )
    if job.early_stopping_patience is not None and not has_eval(job):
        yield "early_stopping_patience: there are no held-out rows; give data.eval or data.validation_split"
    if job.early_stopping_patience is not None and config.eval_steps is None:
        yield "early_stopping_patience: eval_steps is null, so nothing is evaluated before the end; set eval_steps"
    yield from _metric_conflicts(job)
    if config.model.cache_vision_features:
        yield from _cached_tower_conflicts(job)
    if job.tuning == "adapter" and (unsaveable := job.adapter.unsaveable) is not None:
        yield f"adapter.type: {unsaveable}"
    if job.tuning == "adapter" and job.adapter.needs_quantized and config.model.storage.type == "dense":
        yield (
            f"adapter.type: {job.adapter.type} makes up for what quantization lost, and model.storage.type dense loses "
            "nothing; choose lora, or a storage of fewer bits"
        )
    if job.tuning == "adapter" and job.adapter.type == "adalora" and job.optimizer.has_own_schedule:
        yield (
            f"optimizer.type: {job.optimizer.type} averages its steps, which brings back what adalora's allocator sets "
            "to 0; choose adamw"
        )
    if job.tuning == "adapter" and isinstance(job.adapter, PromptSettings):
        yield from _prompt_conflicts(config, job)
        if needs(job.objective.build(), "reference_logits"):
            yield f"objective.loss_type: asft compares places that {job.adapter.type} moves; take another adapter"
    if job.tuning == "adapter" and job.adapter.needs_calibration and job.data.streaming:
        yield (
            f"adapter.type: {job.adapter.type} looks at the data before it starts, and with data.streaming it is read "
            "once; leave streaming out, or choose lora"
        )
    if job.tuning == "adapter" and job.optimizer.not_for_adapters:
        yield (
            f"optimizer.type: {job.optimizer.type} is for tuning: full, {job.optimizer.not_for_adapters}; choose "
            "adamw, or paged_adamw_8bit"
        )
    if job.tuning == "adapter" and job.optimizer.layerwise:
        yield (
            "optimizer.layerwise is for tuning: full and freeze; the gradients of an adapter are small. Leave it out"
        )
    if job.optimizer.is_blockwise and any(needs(job.objective.build(), each) for each in ("value", "token_values")):
        yield (
            f"optimizer.type: {job.optimizer.type} trains layer by layer, and the value head that objective "
            f"{job.objective.type} trains is in none; choose galore_8bit or adamw_8bit"
        )
    if job.optimizer.has_own_schedule and job.schedule.type != "constant":
        yield (
            f"schedule.type: optimizer {job.optimizer.type} takes the place of a schedule; set schedule: constant "
            "(with warmup_steps, if you like)"
        )
    if job.trains_base and job.adapter.path is not None:
        yield f"adapter.path: with tuning: {job.tuning} there is no adapter to continue; set tuning: adapter"


def _cached_tower_conflicts(job: JobConfig) -> Iterator[str]:
    if job.trains_base:
        yield (
            f"model.cache_vision_features: tuning: {job.tuning} trains the base's own parameters; leave "
            "model.cache_vision_features out"
        )
        return
    for name in ("freeze_vision_tower", "freeze_multi_modal_projector"):
        if not getattr(job.adapter, name):
            yield (
                f"adapter.{name}: false trains what features are kept of, so they change with every step; leave "
                "model.cache_vision_features out"
            )


def _prompt_conflicts(config: RunConfig, job: JobConfig) -> Iterator[str]:
    if config.model.attention == "padded":
        yield f"model.attention: adapter.type {job.adapter.type} needs packed documents; leave attention out"
    if config.model.shift_attn is not None:
        yield f"model.shift_attn: not with adapter.type {job.adapter.type}, whose tokens only the first group would see"
    if job.neftune_noise_alpha is not None:
        yield f"neftune_noise_alpha: not with adapter.type {job.adapter.type}, whose vectors have no place for noise"


def _looks_twice(job: JobConfig) -> bool:
    """Whether the objective compares what training gives with what was computed before."""
    objective = job.objective.build()
    return any(needs(objective, each) for each in ("reference", "rollouts", "mismatched"))


def _metric_conflicts(job: JobConfig) -> Iterator[str]:
    if job.eval_metric == "loss":
        return
    objective = job.objective.build()
    if not has_eval(job):
        yield "eval_metric: there are no held-out rows; give data.eval or data.validation_split"
    if objective.record is Text or needs(objective, "value"):
        yield f"eval_metric: objective {job.objective.type} learns no answers, so {job.eval_metric} has none; use loss"
    if job.data.train_on_prompt:
        yield "eval_metric: with data.train_on_prompt questions and answers are learned alike; use loss"
    if job.data.on_too_long == "split":
        yield "eval_metric: data.on_too_long: split cuts questions from their answers; choose drop or truncate"


def _rollout_conflicts(job: JobConfig, settings: RolloutSettings) -> Iterator[str]:
    objective: Any = job.objective.build()
    if not settings.reward_funcs and settings.reward_model is None:
        yield (
            f"objective.reward_funcs: {job.objective.type} learns from rewards for its own answers; name at least one "
            "function that gives them, my_module:fn, or a reward_model"
        )
    if job.tuning == "full" and objective.needs_reference:
        yield (
            f"objective: {job.objective.type} holds the model to the base as it was, which tuning: full changes; set "
            "the weight of its KL term to 0, or tuning: adapter"
        )
