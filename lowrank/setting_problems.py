"""pydantic's complaints about a group of settings in plain words, each with its place as the user wrote it."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.peer_names import called_in_group
from lowrank.terminal import visible

Path = tuple[Any, ...]
"""Keys and list places from the top of the settings to one of them."""


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


def error_lines(error: ValidationError, settings: Mapping[str, Any], kind: Any) -> list[str]:
    """One line per problem: `betas.0: expected a number, got 'x'`.

    `settings` are what was validated; `kind` is what they are settings of. For jobs and runs there is
    config/problems.py, which knows more of what was meant.
    """
    by_path: dict[Path, list[Any]] = {}
    for entry in error.errors():
        by_path.setdefault(existing(entry["loc"], entry["type"], settings), []).append(entry)
    return [_line(path, entries, settings, kind) for path, entries in by_path.items()]


def dotted(path: Path) -> str:
    """`("jobs", 1, "name")` as `jobs.1.name`."""
    return visible(".".join(map(str, path)))[:200]


def _line(path: Path, entries: Sequence[Any], settings: Mapping[str, Any], kind: Any) -> str:
    place, first = dotted(path) or "the settings", entries[0]
    if first["type"] == "extra_forbidden":
        *parents, key = path
        known = known_keys(tuple(parents), settings, kind)
        owner = "" if parents else getattr(kind, "__name__", "")
        return f"{place}: unknown key{called_in_group(str(key), known, owner) or did_you_mean(str(key), known)}"
    if first["type"] == "value_error" and not path:
        return str(first["ctx"]["error"])
    return f"{place}: {complaint(entries)}"


def complaint(entries: Sequence[Any]) -> str:
    """What pydantic's `entries` of one place say, except for an unknown key: what was expected there, and was given."""
    first = entries[0]
    if first["type"] == "missing":
        return "required, but not given"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    expected = list(dict.fromkeys(_expected(entry) for entry in entries))
    if "a number" in expected and "a whole number" in expected:
        expected.remove("a whole number")
    hint = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = _near(first["input"], first["ctx"]["expected"])
    return f"expected {' or '.join(expected)}, got {_short(first['input'])}{hint}"


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
        return _number_of_values(kind, context)
    return _EXPECTED.get(kind, str(entry["msg"])[:1].lower() + str(entry["msg"])[1:])


def _number_of_values(kind: str, context: Mapping[str, Any]) -> str:
    bound = context.get("max_length", context.get("min_length"))
    if context.get("field_type") == "Tuple":  # so many, no fewer and no more
        return f"{bound} values"
    return f"{'at least' if kind == 'too_short' else 'at most'} {bound} value{'' if bound == 1 else 's'}"


def _near(given: str, expected: str) -> str:
    suggestion = did_you_mean(given, re.findall(r"'([^']*)'", expected))
    return suggestion if "did you mean" in suggestion else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def existing(loc: Path, kind: str, value: Any) -> Path:
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


def known_keys(path: Path, settings: Mapping[str, Any], kind: Any, defaults: Collection[str] = ()) -> list[str]:
    """Names of the settings of the group at `path`; `defaults` are meant where a group does not say its `type`."""
    group = _group_of(kind, settings, defaults)
    value: Any = settings
    for key in path:
        value = value[key]
        if isinstance(key, int) or group is None:
            continue
        group = _group_of(group.model_fields[key].annotation, value, defaults) if key in group.model_fields else None
    return list(group.model_fields) if group else []


def _group_of(annotation: Any, value: Any, defaults: Collection[str]) -> type[BaseModel] | None:
    """The class of settings behind an annotation; among several the one whose `type` is chosen."""
    groups = groups_in(annotation)
    if len(groups) > 1 and isinstance(value, Mapping):
        wanted = (value["type"],) if "type" in value else defaults
        chosen = [group for group in groups if set(get_args(group.model_fields["type"].annotation)) & {*wanted}]
        if ":" in str(value.get("type")):
            return None  # a third party's, known only to its validation
        return chosen[0] if chosen else groups[0]
    return groups[0] if groups else None


def groups_in(annotation: Any) -> list[type[BaseModel]]:
    """The classes of settings that an annotation names, in unions, lists and tuples too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list) or get_args(annotation):
        return [group for part in get_args(annotation) for group in groups_in(part)]
    return []
