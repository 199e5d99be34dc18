"""A sweep in the settings: its candidates as entries of `jobs`, and complaints about them in the words of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lowrank.search.candidates import first_candidates
from lowrank.search.config import SweepConfig

SECTIONS = ("grid", "random", "candidates")


def with_candidates(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the candidates of `sweep` as `jobs`. Where there are jobs (in the config.json of a run), they
    stay; a sweep that is none stays for validation to complain about."""
    sweep = settings.get("sweep")
    if sweep is None or settings.get("jobs"):
        return dict(settings)
    try:
        found = sweep if isinstance(sweep, SweepConfig) else SweepConfig.model_validate(sweep)
    except ValidationError:
        return dict(settings)
    return {**settings, "jobs": [candidate.as_entry() for candidate in first_candidates(found)]}


def swept_path(loc: tuple[Any, ...], settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Where in `sweep` the setting of a job stands that a complaint is about; None if it is not swept.

    `loc`: pydantic's, `("jobs", 3, "adapter", "lora", "rank")`.
    """
    sweep = settings.get("sweep")
    if not isinstance(sweep, Mapping) or settings.get("jobs") or loc[:1] != ("jobs",):
        return None
    for section in SECTIONS:
        given = sweep.get(section)
        groups = given if isinstance(given, (list, tuple)) else [given]
        for name in (name for group in groups if isinstance(group, Mapping) for name in group):
            if _is_about(loc[2:], str(name).split(".")):
                return ("sweep", section, str(name))
    return None


def _is_about(loc: tuple[Any, ...], keys: list[str]) -> bool:
    """Whether all keys stand in `loc` in their order: between them are pydantic's names of alternatives."""
    rest = iter(map(str, loc))
    return all(key in rest for key in keys)
