"""A sweep as rows of a form: a setting, how its values are chosen, and these as text; and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lowrank.board import form
from lowrank.errors import ConfigError, raise_all
from lowrank.foreign_yaml import load_yaml

VALUES, CHOICE, LOG, BETWEEN, WHOLE = "values", "choice", "log_uniform", "uniform", "integer"
WAYS = (VALUES, LOG, BETWEEN, WHOLE, CHOICE)
"""Of choosing values: all of them (`sweep.grid`), or drawn (`sweep.random`)."""
FIRST = (
    "adapter.rank", "optimizer.learning_rate", "adapter.type", "adapter.alpha", "adapter.dropout",
    "adapter.target_modules", "schedule.type", "data.batch_size", "num_train_epochs", "objective.beta", "data.train",
    "seed",
)  # fmt: skip
"""Settings that stand first in the list."""


def settings_of_jobs() -> list[str]:
    """All settings that a candidate can have: those of a job."""
    others = [path for path in form.fields() if path.partition(".")[0] in form.groups_of_jobs() and path not in FIRST]
    return [*FIRST, *others]


def as_sweep(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`grid` and `random` of a sweep; rows without a setting or values are left out. ConfigError with all that is
    wrong, each at `sweep`."""
    found: dict[str, Any] = {}
    problems = []
    for row in rows:
        path, how, text = (str(row.get(key, "")).strip() for key in ("path", "how", "text"))
        if not path or not text:
            continue
        if any(path in group for group in found.values()):
            problems.append(f"sweep: {path} has two rows")
            continue
        try:
            values = _values(path, text)
        except (yaml.YAMLError, RecursionError):
            problems.append(f"sweep: the values of {path} cannot be read; lists look like [[q_proj], [v_proj]]")
            continue
        if how in (LOG, BETWEEN, WHOLE) and len(values) != 2:
            problems.append(f"sweep: {path}: expected two numbers, as 8, 64, got {text[:100]!r}")
        elif how == VALUES or not how:
            found.setdefault("grid", {})[path] = values
        else:
            found.setdefault("random", {})[path] = {how: values}
    raise_all(ConfigError, "The settings cannot be used:", problems)
    return found


def num_candidates(sweep: Any) -> int:
    """How many candidates a sweep that is in order has, 0 where there is none (search/candidates.py: num_trials)."""
    if not isinstance(sweep, Mapping):
        return 0
    grid = math.prod(len(values) for _, values in _items(sweep.get("grid")) if isinstance(values, list))
    listed = sweep.get("candidates")
    combinations = grid * max(1, len(listed) if isinstance(listed, list) else 0)
    most = sweep.get("max_trials")
    if not isinstance(most, int) or isinstance(most, bool):
        return 0 if sweep.get("random") else combinations
    return most if sweep.get("random") else min(combinations, most)


def as_rows(sweep: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows that give this sweep's `grid` and `random`."""
    rows = [
        {"path": str(path), "how": VALUES, "text": _text(str(path), values)}
        for path, values in _items(sweep.get("grid"))
    ]
    for path, draw in _items(sweep.get("random")):
        for how, values in _items(draw):
            if values is not None:
                rows.append({"path": str(path), "how": str(how), "text": _text(str(path), values)})
    return rows


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _values(path: str, text: str) -> list[Any]:
    """`8, 16` as numbers; of a list setting each value is between semicolons; `[...]` is read as YAML."""
    if text.startswith("["):
        read = load_yaml(text, form.MOST_VALUES)
        return read if isinstance(read, list) else [read]
    known = form.fields().get(path)
    parts = text.split(";") if known is not None and known.kind == form.LIST else text.split(",")
    return [form.parsed(known, part) if known is not None else part.strip() for part in parts if part.strip()]


def _text(path: str, values: Any) -> str:
    listed = list(values) if isinstance(values, (list, tuple)) else [values]
    known = form.fields().get(path)
    if known is not None and known.kind == form.LIST:
        if all(isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) for value in listed):
            return "; ".join(", ".join(value) for value in listed)
    elif all(isinstance(value, (int, float, str)) and not isinstance(value, bool) for value in listed):
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in listed)
    return yaml.safe_dump(listed, default_flow_style=True, allow_unicode=True, width=10**6).strip()
