"""Assignment of whole jobs to devices or machines (shares), each with about the same work."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.config import JobConfig, RunConfig
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError
from lowrank.objectives import needs
from lowrank.pipelines.memory_plan import tokens_to_train
from lowrank.planning.simulation import read_config
from lowrank.train.load_balancing import balance
from lowrank.train.rollouts import worst_case_step

_ANSWERING = 2.0
"""Times a token's training, what it costs to have drawn it first, roughly."""


def assign_jobs(config: RunConfig, data: Sequence[Prepared], shares: int) -> dict[str, int]:
    """Return the share of each job by its name, from 1 to `shares`; `data` is in the order of the jobs."""
    assigned = balance(job_costs(config, data), shares)
    return {job.name: share + 1 for job, share in zip(config.jobs, assigned)}


def job_costs(config: RunConfig, data: Sequence[Prepared]) -> list[float]:
    """Return what each job costs, in tokens through the base: forward and backward, with the adapter's own part."""
    width = getattr(read_config(config.model), "hidden_size", None) or 0
    return [_cost(job, prepared, width) for job, prepared in zip(config.jobs, data)]


def _cost(job: JobConfig, data: Prepared, width: int) -> float:
    tokens = float(tokens_to_train([job], [data]))
    objective = job.objective.build()
    if needs(objective, "rollouts"):
        step = data.train.heaviest_step()
        answered = sum(map(len, worst_case_step(objective, step))) / max(1, sum(map(len, step)))
        tokens *= answered * (1.0 + _ANSWERING)
    rank = getattr(job.adapter, "rank", 0)
    # a frozen matrix of D x D costs 4 D^2 for each token, an adapter of rank R beside it 12 R D
    return tokens * (1.0 + (3.0 * rank / width if width else 0.0))


def uses_job_parallelism(config: RunConfig, devices: int) -> bool:
    """Return whether each device trains whole jobs (true), or all devices share every step (false). ConfigError where
    `parallelism: jobs` is set and there are fewer jobs than devices."""
    if config.parallelism == "jobs" and len(config.jobs) < devices:
        raise ConfigError(
            f"parallelism: jobs needs at least {devices} jobs, one for each device, got {len(config.jobs)}; set fewer "
            "devices, or parallelism: data"
        )
    if config.parallelism != "auto":
        return config.parallelism == "jobs"
    if config.base != "replicated":  # which only ranks of one run hold between them
        return False
    one_after_another = config.sweep is not None and config.sweep.sampler == "optuna"
    return len(config.jobs) >= devices and not one_after_another
