"""Jobs over the top level: short forms spelled out, and each entry completed by what stands at the top.

Works on plain dicts, before validation. One rule: an entry overrides the top setting by setting. Where
an entry chooses another `type` than the top, only the settings that all types share are taken over
from the top (an adapter's rank is; what belongs to one type alone is not).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.settings import Settings, configs_in

SHORT_FORMS = {
    "model": "path",
    "data": "train",
    "adapter": "type",
    "objective": "type",
    "optimizer": "type",
    "schedule": "type",
}
"""Groups of settings, and the setting that a bare value stands for: `model: lowrank/tiny` is `{path: lowrank/tiny}`."""

TYPED = {
    "adapter": ("lowrank.adapters.variants", "lora"),
    "objective": ("lowrank.objectives", "sft"),
    "optimizer": ("lowrank.train.optimizers", "adamw"),
}
"""Groups whose `type` decides which settings there are: the folder of types, and the one meant by default."""


def spell_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with every group as a dict, in the entries of `jobs` too."""
    spelled = {key: _as_group(SHORT_FORMS.get(key), value) for key, value in settings.items()}
    jobs = spelled.get("jobs")
    if isinstance(jobs, Sequence) and not isinstance(jobs, str):
        spelled["jobs"] = [_spell_out_job(job) for job in jobs]
    return spelled


def _spell_out_job(job: Any) -> Any:
    job = as_dict(job)
    return spell_out(job) if isinstance(job, Mapping) else job


def _as_group(main: str | None, value: Any) -> Any:
    value = as_dict(value)
    if main is not None and (isinstance(value, str) or (main == "train" and isinstance(value, (list, tuple)))):
        return {main: value}
    return value


def as_dict(value: Any) -> Any:
    """A `Settings` object, as Python callers pass it, as the dict of what was set on it."""
    if not isinstance(value, Settings):
        return value
    values = {name: getattr(value, name) for name in value.model_fields_set}
    if "type" in type(value).model_fields:
        values["type"] = getattr(value, "type")  # noqa: B009 (not every group has one)
    return values


def complete_jobs(settings: Mapping[str, Any], job_keys: Sequence[str], default_name: str) -> Any:
    """The entries of `settings["jobs"]`, each over the job settings at the top; without entries, one job of the top.

    `settings` are spelled out. What is not a list, or an entry that is not a dict, is handed through for
    validation to complain about.
    """
    top = {key: settings[key] for key in job_keys if key in settings}
    entries = settings.get("jobs")
    if entries is None or (isinstance(entries, (list, tuple)) and not entries):
        return [{"name": default_name, **top}]
    if not isinstance(entries, list):
        return entries
    return [_over(top, entry) if isinstance(entry, Mapping) else entry for entry in entries]


def _over(top: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(top)
    for key, value in entry.items():
        base = merged.get(key)
        if key in SHORT_FORMS and isinstance(value, Mapping) and isinstance(base, Mapping):
            value = {**_kept(key, base, value), **value}
        merged[key] = value
    return merged


def _kept(group: str, base: Mapping[str, Any], value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those settings of `base` that still have a meaning under the type that `value` chooses."""
    if group not in TYPED or "type" not in value:
        return base
    package, default = TYPED[group]
    old, new = base.get("type", default), value["type"]
    if old == new:
        return base
    shared = _shared_settings(package, old, new)
    return {name: setting for name, setting in base.items() if name in shared}


def _shared_settings(package: str, one: Any, other: Any) -> set[str]:
    """Names of the settings that two types inherit from the same class."""
    configs = configs_in(package)
    known = [isinstance(each, str) and each in configs for each in (one, other)]
    if not all(known):
        return set()
    ancestor = next(cls for cls in configs[one].__mro__ if issubclass(configs[other], cls))
    return set(ancestor.model_fields) if issubclass(ancestor, Settings) else set()
