"""A LLaMA-Factory (v0) training file, read as it is.

    their mapping -> Keys (checked, with LLaMA-Factory's defaults) -> the native mapping

What a key becomes stands in `keys` and `other_keys`. A key that cannot be honored is an error
that names the way out; a key without effect here is a warning if it would have mattered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank.compat.llamafactory import method
from lowrank.compat.llamafactory.contradictions import contradictions
from lowrank.compat.llamafactory.data import Datasets, data_settings, named_datasets
from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.other_keys import NO_EFFECT, REFUSED, find, is_default, known
from lowrank.compat.llamafactory.run import run_settings
from lowrank.compat.llamafactory.sharding import sharding
from lowrank.config.problems import error_lines
from lowrank.config.read import named_source
from lowrank.config.schema import RunConfig
from lowrank.errors import ConfigError, did_you_mean, raise_all

MARKS = ("model_name_or_path", "finetuning_type", "stage", "dataset", "dataset_dir", "template")
"""Keys that only such a file has."""

PAGE = "docs/llamafactory.md"
"""Every key of theirs, and what becomes of it."""


@dataclass
class Converted:
    """The native form of a file, and what its reader should know."""

    config: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def is_llamafactory(settings: Mapping[str, Any]) -> bool:
    """Whether this is such a file rather than a native one."""
    return any(mark in settings for mark in MARKS) and not any(key in settings for key in ("model", "data", "jobs"))


def convert(
    settings: Mapping[str, Any],
    *,
    folder: Path,
    datasets: Datasets | None = None,
    source: str = "these settings",
    overrides: Sequence[str] = (),
) -> Converted:
    """The native form of a LLaMA-Factory file that lies in `folder`.

    `datasets`: sources for training and evaluation, in place of names in a dataset_info.json. Raises `ConfigError` with
    every key that is unknown, malformed, or cannot be honored.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    problems, warnings = _sort_keys(settings)
    keys = _readable(settings, problems)
    problems += contradictions(keys)
    train, evaluation = named_datasets(keys, folder, problems) if datasets is None else datasets
    config = {
        "model": method.model(keys, problems, warnings),
        "data": data_settings(keys, train, evaluation, problems, warnings),
        "adapter": method.adapter(keys),
        "objective": method.objective(keys, warnings),
        "optimizer": method.optimizer(keys, problems),
        "schedule": method.schedule(keys, problems, warnings),
        **run_settings(keys, problems, warnings),
    }
    placed, lines = sharding(keys, folder)
    config |= placed
    warnings += lines
    raise_all(
        ConfigError,
        f"{named_source(source, overrides, problems)}, read as LLaMA-Factory's, cannot be used as it is:",
        problems,
    )
    return Converted({key: value for key, value in config.items() if value != {}}, warnings)


def _readable(settings: Mapping[str, Any], problems: list[str]) -> Keys:
    """The honored keys; those that are malformed are reported and left at their defaults, so that all is checked."""
    given = {key: value for key, value in settings.items() if key in Keys.model_fields}
    try:
        return Keys.model_validate(given)
    except ValidationError as error:
        problems += error_lines(error, settings, RunConfig)
        malformed = {entry["loc"][0] for entry in error.errors()}
    required = {name: "-" for name, field in Keys.model_fields.items() if field.is_required()}
    return Keys.model_validate(required | {key: value for key, value in given.items() if key not in malformed})


def _sort_keys(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong with the keys themselves, and which of them have no effect though they ask for something."""
    problems, warnings = [], []
    for key, value in settings.items():
        silent, refused = find(NO_EFFECT, key), find(REFUSED, key)
        if refused is not None and not is_default(refused, value):
            problems.append(f"{key}: {value!r} is not supported: {refused.why}")
        elif silent is not None and silent.speaks and not is_default(silent, value):
            warnings.append(f"{key} has no effect: {silent.why}")
        elif silent is None and refused is None and key not in Keys.model_fields:
            native = " (a native key; give it on the command line)" if key in RunConfig.model_fields else ""
            problems.append(f"{key}: unknown key{native}{did_you_mean(key, known(), PAGE)}")
    return problems, warnings
