"""The settings of a run: one schema, read from Python, YAML or JSON, and dotted overrides."""

from lowrank.config.checks import has_eval
from lowrank.config.no_effect import unused
from lowrank.config.read import load, override, read_file, settings_of_run, validate_settings
from lowrank.config.schema import JobConfig, RunConfig, steps_of

__all__ = [
    "JobConfig",
    "RunConfig",
    "has_eval",
    "load",
    "override",
    "read_file",
    "settings_of_run",
    "steps_of",
    "unused",
    "validate_settings",
]
