"""pydantic's complaints in plain words, each with the place as the user wrote it."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from lowrank.config.jobs import TYPED
from lowrank.config.refused_parallelism import why_refused
from lowrank.config.renamed import new_name
from lowrank.config.schema import JobSettings, RunConfig, SettingsConflict
from lowrank.config.sweeps import swept_path
from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.settings import Settings
from lowrank.terminal import visible

SETTINGS_PAGE = "docs/settings.md"
Path = tuple[Any, ...]
"""Keys and list places from the top of the file to a setting."""


def settings_of(kind: Any, values: Mapping[str, Any], heading: str) -> Any:
    """`values` as the settings `kind`: a class of `Settings`, or one of several told apart by `type`.

    ConfigError under `heading` with a line for each problem, as files get them.
    """
    problems: list[str] = []
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = error_lines(error, values, kind)
    raise_all(ConfigError, heading, problems)
    raise AssertionError("pydantic refused settings and named no problem")


def error_lines(error: ValidationError, settings: Mapping[str, Any], kind: Any = RunConfig) -> list[str]:
    """One line per problem: `jobs.1.adapter.rnk: unknown key; did you mean 'rank'?`.

    `settings` are what was validated, spelled out, with `jobs` as the user wrote them; `kind` is what they are
    settings of: a whole run, or a group of its own (`GenerationConfig`, an export target's).
    """
    conflicts: list[str] = []
    by_path: dict[Path, list[Any]] = {}
    for entry in error.errors():
        cause = entry.get("ctx", {}).get("error")
        if isinstance(cause, SettingsConflict):
            conflicts.extend(cause.problems)
        else:
            # a mistake at the top level is found again in every job: one line for it
            swept = swept_path(entry["loc"], settings)
            by_path.setdefault(swept or _as_written(entry["loc"], entry["type"], settings), []).append(entry)
    return [_line(path, entries, settings, kind) for path, entries in by_path.items()] + conflicts


def dotted(path: Path) -> str:
    """`("jobs", 1, "name")` as `jobs.1.name`."""
    return visible(".".join(map(str, path)))[:200]


def _line(path: Path, entries: Sequence[Any], settings: Mapping[str, Any], kind: Any) -> str:
    first = entries[0]
    place = dotted(path) or ("the file" if kind is RunConfig else "the settings")
    if kind is RunConfig and len(path) == 1 and first["type"] in ("extra_forbidden", "literal_error"):
        reason = why_refused(str(path[0]), first["input"])
        if reason is not None:
            return f"{place}: {reason}"
    if first["type"] == "extra_forbidden":
        if path[:1] == ("sweep",) and len(path) == 3:
            return f"{place}: jobs have no such setting{did_you_mean(path[2], _dotted_names(), SETTINGS_PAGE)}"
        return f"{place}: unknown key{_suggestion(path, settings, kind)}"
    if first["type"] == "missing":
        return f"{place}: required, but not given{_help(path, settings, kind)}"
    if first["type"] == "value_error":
        problem = str(first["ctx"]["error"])
        return f"{place}: {problem}" if path or kind is RunConfig else problem
    expected = list(dict.fromkeys(_expected(entry) for entry in entries))
    if "a number" in expected and "a whole number" in expected:
        expected.remove("a whole number")
    hint = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = _near(first["input"], first["ctx"]["expected"])
    return f"{place}: expected {' or '.join(expected)}, got {_short(first['input'])}{hint}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a group of settings (key: value)",
    "model_type": "a group of settings (key: value)",
    "model_attributes_type": "a group of settings (key: value)",
    "finite_number": "a finite number",
}


def _expected(entry: Any) -> str:
    kind, context = entry["type"], entry.get("ctx", {})
    comparisons = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in comparisons:
        relation = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}[comparisons[kind]]
        return f"a number {relation} {context[comparisons[kind]]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "multiple_of":
        return f"a multiple of {context['multiple_of']:g}"
    if kind == "string_pattern_mismatch":
        return "letters, digits and any of . _ + = - (it names a folder)"
    if kind in ("string_too_short", "string_too_long"):
        return (
            f"a text of {'at least' if kind.endswith('short') else 'at most'} {next(iter(context.values()))} characters"
        )
    if kind in ("too_long", "too_short"):
        return f"{context.get('max_length', context.get('min_length'))} values"
    return _EXPECTED.get(kind, str(entry["msg"])[:1].lower() + str(entry["msg"])[1:])


def _near(given: str, expected: str) -> str:
    suggestion = did_you_mean(given, re.findall(r"'([^']*)'", expected))
    return suggestion if "did you mean" in suggestion else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_written(loc: Path, kind: str, settings: Mapping[str, Any]) -> Path:
    """Where the user wrote it: without pydantic's names of alternatives, and at the top where the entry of `jobs`
    got it from there."""
    if len(loc) < 2 or loc[0] != "jobs" or not isinstance(settings.get("jobs"), list):
        rest = loc[2:] if loc[:1] == ("jobs",) and len(loc) > 2 else loc
        return _existing(rest, kind, settings)
    if not settings["jobs"]:  # no entries: the one job is the top level
        return _existing(loc[2:], kind, settings)
    entry = settings["jobs"][loc[1]]
    inside = _existing(loc[2:], kind, entry)
    at_top = _existing(loc[2:], kind, settings)
    if isinstance(entry, Mapping) and len(inside) < len(at_top) and loc[2:3] != ("name",):
        return at_top
    return ("jobs", loc[1], *inside)


def _existing(loc: Path, kind: str, value: Any) -> Path:
    """The part of `loc` that can be walked in `value`; a missing key is its own last step."""
    path: list[Any] = []
    for place, key in enumerate(loc):
        in_list = isinstance(value, (list, tuple)) and isinstance(key, int) and key < len(value)
        if in_list or (isinstance(value, Mapping) and key in value):
            value = value[key]
        elif kind == "missing" and place == len(loc) - 1:
            path.append(key)
            break
        else:
            continue
        path.append(key)
    return tuple(path)


def _suggestion(path: Path, settings: Mapping[str, Any], kind: Any) -> str:
    *parents, key = path
    if kind is not RunConfig:
        return did_you_mean(str(key), known_keys(tuple(parents), settings, kind))
    now = new_name(path)
    if now is not None:
        return f"; it is called {now!r} now"
    known = known_keys(tuple(parents), settings)
    if parents[:1] == ["jobs"] and len(parents) == 2 and key in RunConfig.model_fields:
        return "; it belongs to the whole run: put it at the top level"
    elsewhere = [dotted(place) for place in _places_of(str(key), RunConfig) if place != path]
    if len(elsewhere) == 1 or (elsewhere and not parents):
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    return did_you_mean(str(key), known, SETTINGS_PAGE)


def known_keys(path: Path, settings: Mapping[str, Any], kind: Any = RunConfig) -> list[str]:
    """Names of the settings of the group at `path`."""
    group = _group_of(kind, settings)
    value: Any = settings
    for key in path:
        value = value[key]
        if isinstance(key, int) or group is None:
            continue
        group = _group_of(group.model_fields[key].annotation, value) if key in group.model_fields else None
    return list(group.model_fields) if group else []


def _group_of(annotation: Any, value: Any) -> type[Settings] | None:
    """The class of settings behind an annotation; among several the one whose `type` is chosen."""
    groups = list(_groups_in(annotation))
    if len(groups) > 1 and isinstance(value, Mapping):
        wanted = (value["type"],) if "type" in value else tuple(default for _, default in TYPED.values())
        chosen = [group for group in groups if set(get_args(group.model_fields["type"].annotation)) & {*wanted}]
        if ":" in str(value.get("type")):
            return None  # a third party's, known only to its validation
        return chosen[0] if chosen else groups[0]
    return groups[0] if groups else None


def _groups_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list) or get_args(annotation):
        return [group for part in get_args(annotation) for group in _groups_in(part)]
    return []


def _dotted_names() -> list[str]:
    """Every setting of a job, with its groups."""
    return sorted({".".join(map(str, place)) for place in _below(JobSettings)})


def _below(group: type[Settings], above: Path = ()) -> list[Path]:
    places: list[Path] = []
    for name, field in group.model_fields.items():
        inner = _groups_in(field.annotation)
        places += [(*above, name), *(place for each in inner for place in _below(each, (*above, name)))]
    return places


def _places_of(key: str, group: type[Settings], above: Path = ()) -> list[Path]:
    """Every place of a setting named `key` in the groups below `group`; entries of `jobs` are left out."""
    places: list[Path] = []
    for name, field in group.model_fields.items():
        for inner in _groups_in(field.annotation):
            if name == "jobs" or get_origin(field.annotation) is tuple:
                continue
            if key in inner.model_fields and (*above, name, key) not in places:
                places.append((*above, name, key))
            places.extend(place for place in _places_of(key, inner, (*above, name)) if place not in places)
    return places


def _help(path: Path, settings: Mapping[str, Any], kind: Any) -> str:
    if kind is not RunConfig:
        return ""
    if path[:1] == ("jobs",) and path[-1:] == ("name",) and len(path) == 3:
        return "; every entry of jobs needs one"
    group: Any = RunConfig if len(path) == 1 else None
    if group is None or path[0] not in group.model_fields or path[0] in JobSettings.model_fields:
        return ""
    text = group.model_fields[path[0]].description or ""
    return f" ({text.split('. ')[0].rstrip('.')})"
