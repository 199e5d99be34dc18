"""Jobs dealt to shares: about the same work for each."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.config import JobConfig, RunConfig
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError
from lowrank.objectives import needs
from lowrank.pipelines.memory_plan import tokens_to_train
from lowrank.planning.simulation import read_config
from lowrank.train.rollouts import worst_case_step

_ANSWERING = 2.0
"""Times a token's training, what it costs to have drawn it first, roughly."""


def deal(costs: Sequence[float], of: int) -> list[int]:
    """The share of each, 1 is the first: the longest first, each to the share that has the least so far
    (Graham, 1969: at most a third above the best there is)."""
    load = [0.0] * of
    shares = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        least = min(range(of), key=lambda each: (load[each], each))
        shares[place], load[least] = least + 1, load[least] + costs[place]
    return shares


def costs_of(config: RunConfig, data: Sequence[Prepared]) -> list[float]:
    """What each job costs, in tokens through the base: forward and backward, with the adapter's own part."""
    width = getattr(read_config(config.model), "hidden_size", None) or 0
    return [_cost(job, own, width) for job, own in zip(config.jobs, data)]


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


def deals_jobs(config: RunConfig, number: int) -> bool:
    """Whether devices are given whole jobs. ConfigError for fewer jobs than devices, where that is asked for."""
    if config.parallelism == "jobs" and len(config.jobs) < number:
        raise ConfigError(
            f"parallelism: jobs: there are {len(config.jobs)} jobs to deal to {number} devices; give fewer devices, or "
            "parallelism: data"
        )
    if config.parallelism != "auto":
        return config.parallelism == "jobs"
    if config.base != "replicated":  # which only ranks of one run hold between them
        return False
    one_after_another = config.sweep is not None and config.sweep.sampler == "optuna"
    return len(config.jobs) >= number and not one_after_another
