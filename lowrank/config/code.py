"""Where the settings of a run name code that is not ours, besides the types that validation itself looks for."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.config.schema import RunConfig
from lowrank.errors import ConfigError, raise_all
from lowrank.objectives.rollout import RolloutSettings
from lowrank.third_party import may_run, names_code, refusal


def code_in(config: RunConfig) -> Iterator[tuple[str, str]]:
    """`(setting, my_module:MyThing)` of reward functions, formats and reporters."""
    for number, name in enumerate(config.report_to):
        if names_code(name):
            yield f"report_to.{number}", name
    for index, job in enumerate(config.jobs):
        above = f"jobs.{index}." if len(config.jobs) > 1 else ""
        if isinstance(job.objective, RolloutSettings):
            for name in job.objective.reward_funcs:
                yield f"{above}objective.reward_funcs", name
        for part in ("train", "eval"):
            for number, source in enumerate(getattr(job.data, part)):
                if names_code(source.format):
                    yield f"{above}data.{part}.{number}.format", source.format


def refuse_code(config: RunConfig, source: str) -> None:
    """ConfigError with every setting that names code, unless the person has allowed it or handed over the object;
    nothing is imported."""
    problems = [f"{place}: {refusal(name)}" for place, name in code_in(config) if not may_run(name)]
    raise_all(ConfigError, f"{source} cannot be used:", problems)
