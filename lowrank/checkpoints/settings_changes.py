"""Compares the settings of a run with those of its checkpoint, and says which of them may differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from lowrank.errors import OutputError, raise_all

MAY_CHANGE = (
    "output_dir", "save_steps", "save_total_limit", "eval_steps", "logging_steps", "report_to", "resume", "overwrite",
    "micro_batch_tokens", "num_train_epochs", "max_steps", "early_stopping_patience", "model.device", "model.attention",
    "model.activation_checkpointing", "model.memory_efficient_modules", "model.trust_remote_code", "ignore_memory_plan",
    "model.cache_vision_features", "max_concurrent_jobs", "devices", "share", "parallelism", "lanes",
)  # fmt: skip
"""What decides where a run writes, how often it looks, how long it goes on and what it runs on, but not what a step
does. (The lengths do move the schedules of learning rates: a person who asks for more steps knows.)"""

_MISSING = object()
_SHOWN_JOBS = 20


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`optimizer.learning_rate: 0.0002 in the checkpoint, now 0.0001`: settings that must not change, but have.

    Both are resolved configurations (`RunConfig.model_dump(mode="json")`); jobs are compared by name, and where the
    names differ, that is the first line.
    """
    saved, requested = _jobs(old), _jobs(new)
    both = saved.keys() & requested.keys()
    before, after = _flat(old, both), _flat(new, both)
    alone = len(saved) == len(requested) == 1
    changes = []
    if saved.keys() != requested.keys():
        changes.append(
            f"jobs: the checkpoint has {_counted(saved)}; these settings have {_counted(requested)}. A job is known by "
            "its name"
        )
    for path in sorted({*before, *after}):
        was, now = before.get(path, _MISSING), after.get(path, _MISSING)
        if was == now or _setting(path).startswith(tuple(f"{name}." for name in MAY_CHANGE)):
            continue
        shown = _setting(path).rstrip(".") if alone else path
        changes.append(f"{shown}: {_format(was)} in the checkpoint, now {_format(now)}")
    return changes


def refuse_changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """OutputError that lists `changed_settings`, if there are any, and says which settings may change."""
    changes = changed_settings(old, new)
    heading = (
        "resume: these settings differ from the checkpoint's, so the result would match neither the old run nor a new "
        "one; restore them, or choose another output_dir. Settings that can change on resume: "
        f"{', '.join(MAY_CHANGE)}. Changed:"
    )
    raise_all(OutputError, heading, changes)


def _jobs(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {job["name"]: job for job in settings.get("jobs") or ()}


def _counted(jobs: Mapping[str, Any]) -> str:
    """`job r8`, `jobs r8, r64`; of very many the first."""
    shown = ", ".join(list(jobs)[:_SHOWN_JOBS])
    more = len(jobs) - _SHOWN_JOBS
    return f"job{'' if len(jobs) == 1 else 's'} {shown or '(none)'}{f' and {more} more' if more > 0 else ''}"


def _flat(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """{dotted path: value}, of the jobs `names` alone. Jobs are complete, so what the top level says for them is left
    out."""
    jobs = _jobs(settings)
    in_jobs = {key for job in jobs.values() for key in job}
    flat = flattened({key: value for key, value in settings.items() if key not in in_jobs and key != "jobs"})
    for name, job in jobs.items():
        if name in names:
            flat |= flattened(job, f"jobs[{name}]")
    return flat


def flattened(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"adapter": {"rank": 8}}` as `{"adapter.rank": 8}`; an empty group stands for itself, and
    lists are values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, path)
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def _setting(path: str) -> str:
    """The path without its job, with a dot at the end."""
    return path.rpartition("].")[2] + "." if path.startswith("jobs[") else path + "."


def _format(value: Any) -> str:
    return "not set" if value is _MISSING else json.dumps(value, ensure_ascii=False, default=str)
