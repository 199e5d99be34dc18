"""Where the settings of a run name code that is not ours, besides the types that validation itself looks for."""

from __future__ import annotations

from lowrank.config.schema import RunConfig
from lowrank.errors import ConfigError, raise_all
from lowrank.third_party import NAME_CODE, code_named, may_run, refusal


def refuse_code(config: RunConfig, source: str) -> None:
    """ConfigError with every reward function, format and reporter that is code, unless the person has allowed it or
    handed over the object; nothing is imported."""
    plain = config.model_dump(include={"report_to", "jobs"})
    jobs = plain.pop("jobs")
    settings = {**plain, "jobs": jobs} if len(jobs) > 1 else {**plain, **jobs[0]}
    named = code_named(settings, lambda setting: setting in NAME_CODE and setting != "type")
    problems = [f"{place}: {refusal(name)}" for place, name in named if not may_run(name)]
    raise_all(ConfigError, f"{source} cannot be used:", problems)
