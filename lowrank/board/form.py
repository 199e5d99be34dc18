"""The settings as fields of a form, drawn from the schema that ships with lowrank, and back into a settings file.

A form is a flat mapping, `{"adapter.rank": "8", "data.train": ["rows.json"]}`: what a person changed, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import lowrank
from lowrank.foreign_yaml import load_yaml

NUMBER, WHOLE, TEXT, CHOICE, SWITCH, LIST, MAP = "number", "whole", "text", "choice", "switch", "list", "map"
MOST_VALUES = 10_000
"""In one field."""
DEFAULT_TYPES = {
    "adapter.type": "lora", "objective.type": "sft", "optimizer.type": "adamw", "model.storage.type": "dense",
}  # fmt: skip
"""What is meant where a group's type is left out. A test compares with what `lowrank show` fills in."""
SOURCES = ("data.train", "data.eval")
"""Lists of files; in a form a list of paths, or of groups where more than the path was set."""
NOT_IN_FORM = ("jobs", "output_dir", "resume", "overwrite", "model.path", "sweep.grid", "sweep.random", *SOURCES)
"""What the page has a place of its own for."""


@dataclass(frozen=True)
class Field:
    """One setting. `when` says under which `type` of its group it is there; empty: always."""

    path: str
    kind: str
    help: str = ""
    default: Any = None
    nullable: bool = False
    choices: tuple[str, ...] = ()
    when: tuple[str, tuple[str, ...]] | None = None
    literals: tuple[str, ...] = ()
    """Texts a number may be instead, as `auto`."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Defaults under types where they are others than `default`."""

    def default_under(self, types: Mapping[str, Any]) -> Any:
        """The default where the groups' types are these (`{"adapter.type": "dora"}`)."""
        if self.when is None:
            return self.default
        chosen = str(types.get(self.when[0]) or DEFAULT_TYPES.get(self.when[0]))
        return dict(self.defaults).get(chosen, self.default)

    def as_dict(self) -> dict[str, Any]:
        """For the page."""
        return {**vars(self)}


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a configuration, as `lowrank show --schema` prints it."""
    path = Path(lowrank.__file__).parent / "config" / "schema.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def fields() -> dict[str, Field]:
    """Every setting by its path, in the order of the schema."""
    found: dict[str, Field] = {}
    for one in _walk(schema()["properties"], "", None):
        known = found.get(one.path)
        found[one.path] = one if known is None else _merged(known, one)
    return found


@cache
def groups_of_jobs() -> frozenset[str]:
    """Groups and settings of the top level that a job has of its own."""
    return frozenset(_resolved(schema()["properties"]["jobs"]["items"])["properties"]) - {"name"}


def _merged(known: Field, other: Field) -> Field:
    """A setting that several types of a group have. The default shown is that of the type meant by default."""
    if known.when is None or other.when is None:
        return known
    usual = DEFAULT_TYPES.get(known.when[0])
    first = other if usual in other.when[1] else known
    chooser, names = known.when
    defaults = {name: known.default_under({chooser: name}) for name in names}
    defaults |= {name: other.default_under({chooser: name}) for name in other.when[1]}
    return replace(
        first,
        when=(chooser, tuple(defaults)),
        defaults=tuple((name, value) for name, value in defaults.items() if value != first.default),
    )


def tidy(text: str) -> str:
    """A description on one line."""
    return re.sub(r"\s+", " ", text).strip()


def nested(form: Mapping[str, Any]) -> dict[str, Any]:
    """The settings a form stands for: values of the right kind, defaults and empty fields left out."""
    known = fields()
    result: dict[str, Any] = {}
    for path, given in form.items():
        field_ = known.get(path)
        value = parsed(field_, given) if field_ else given
        default = field_.default_under(form) if field_ else None
        if value is None and default is None:
            continue
        if value == "" or (field_ is not None and value == default and not path.endswith(".type")):
            continue
        if path in DEFAULT_TYPES and value == DEFAULT_TYPES[path]:
            continue
        put(result, path, value)
    return result


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path."""
    here = settings
    *above, last = path.split(".")
    for key in above:
        inner = here.setdefault(key, {})
        here = inner if isinstance(inner, dict) else here
    here[last] = value


def entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `jobs` from texts or values by dotted setting; empty ones are left to the top level."""
    known = fields()
    found: dict[str, Any] = {}
    for path, given in values.items():
        if str(given).strip() != "":
            put(found, path, parsed(known[path], given) if path in known else given)
    return found


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A complete configuration, as `lowrank show --json` prints it, as a form: what differs from the defaults."""
    known = fields()
    found: dict[str, Any] = {}
    types = {path: _at(settings, path) for path in DEFAULT_TYPES}

    def look(value: Any, path: str) -> None:
        if path == "jobs":
            return
        if path in SOURCES:
            if value:
                found[path] = [_source(item) for item in value]
        elif path in known:
            if value != known[path].default_under(types) and not (
                path in DEFAULT_TYPES and value == DEFAULT_TYPES[path]
            ):
                found[path] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                look(item, f"{path}.{key}" if path else key)
        elif value is not None and value != []:
            found[path] = value

    look(settings, "")
    return found


def parsed(field_: Field, given: Any) -> Any:
    """What a person typed as a value of the field's kind; what cannot be one stays text, which the command refuses."""
    if not isinstance(given, str):
        return given
    text = given.strip()
    if text == "":
        return None
    if field_.kind in (NUMBER, WHOLE) and text not in field_.literals:
        return _number(text, field_)
    if field_.kind == SWITCH:
        return {"true": True, "false": False}.get(text.lower(), text)
    if field_.kind in (LIST, MAP):
        return _collection(text, field_)
    return text


def as_yaml(settings: Mapping[str, Any]) -> str:
    """A settings file. Texts that YAML would take for something else are in quotes."""
    plain = json.loads(json.dumps(settings))  # what stands in two places would be an alias in one
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _walk(properties: Mapping[str, Any], above: str, when: tuple[str, tuple[str, ...]] | None) -> Iterator[Field]:
    for name, raw in properties.items():
        path = f"{above}{name}"
        node = _resolved(raw)
        help_text = tidy(raw.get("description") or node.get("description") or "")
        if path == "jobs" or "const" in node:
            continue
        if "discriminator" in node:
            yield from _union(node, path, help_text)
        elif "properties" in node:
            yield from _walk(node["properties"], f"{path}.", when)
        elif (group := _optional_group(node)) is not None:
            yield from _walk(group["properties"], f"{path}.", when)
        else:
            yield _leaf(node, path, help_text, when)


def _union(node: Mapping[str, Any], path: str, help_text: str) -> Iterator[Field]:
    mapping = node["discriminator"]["mapping"]
    chooser = f"{path}.type"
    yield Field(chooser, CHOICE, help_text, DEFAULT_TYPES.get(chooser), choices=tuple(mapping))
    for name, reference in mapping.items():
        properties = dict(_resolved({"$ref": reference})["properties"])
        properties.pop("type", None)
        yield from _walk(properties, f"{path}.", (chooser, (name,)))


def _leaf(node: Mapping[str, Any], path: str, help_text: str, when: tuple[str, tuple[str, ...]] | None) -> Field:
    options = [_resolved(option) for option in node.get("anyOf", [node])]
    nullable = any(option.get("type") == "null" for option in options)
    options = [option for option in options if option.get("type") != "null"]
    types = {option.get("type") for option in options}
    literals = tuple(str(w) for o in options for w in (o.get("enum") or ([o["const"]] if "const" in o else ())))
    if types <= {"string"} and literals:
        kind = CHOICE
    elif types & {"array"}:
        kind = LIST
    elif types & {"object"}:
        kind = MAP
    elif types & {"number"}:
        kind = NUMBER
    elif types & {"integer"}:
        kind = WHOLE
    else:
        kind = SWITCH if types == {"boolean"} else TEXT
    choices = literals if kind == CHOICE else ()
    default = node.get("default", [] if kind == LIST else {} if kind == MAP else None)
    return Field(path, kind, help_text, default, nullable, choices, when, literals if kind != CHOICE else ())


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        node = schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _optional_group(node: Mapping[str, Any]) -> Mapping[str, Any] | None:
    groups = [_resolved(option) for option in node.get("anyOf", ())]
    return next((group for group in groups if "properties" in group), None)


def _source(item: Any) -> Any:
    """A source of data as its path alone, or as a group of what differs from the defaults."""
    if not isinstance(item, Mapping):
        return item
    known = _resolved({"$ref": "#/$defs/SourceConfig"})["properties"]
    own = {key: value for key, value in item.items() if value != known.get(key, {}).get("default", {})}
    return own["path"] if set(own) == {"path"} else own


def _at(settings: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def _number(text: str, field_: Field) -> Any:
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        return text
    whole = re.fullmatch(r"[-+]?\d+", text) is not None
    return int(text) if whole and (field_.kind == WHOLE or not isinstance(field_.default, float)) else value


def _collection(text: str, field_: Field) -> Any:
    if field_.kind == LIST and text[:1] not in "[{":
        return [_plain(part.strip()) for part in re.split(r"[,\n]", text) if part.strip()]
    try:
        return load_yaml(text, MOST_VALUES)
    except (yaml.YAMLError, RecursionError):
        return text


def _plain(text: str) -> Any:
    """A number where the text is one."""
    try:
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    except ValueError:
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes what lowrank's YAML 1.2 reader or others' 1.1 readers would not take for text."""


_NO_TEXT = re.compile(
    r"(?i)|~|null|true|false|yes|no|on|off|y|n|[-+]?(\.\d+|\d[\d_]*(\.\d*)?)(e[-+]?\d+)?|0[ox][\da-f]+|[-+]?\.inf|\.nan"
)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if _NO_TEXT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class Problem:
    """What a command said about a setting; `path` is empty where it is about none."""

    path: str
    text: str


_LINE = re.compile(r"\s*- (?P<path>[a-z_][\w.]*): (?P<text>.+)", re.DOTALL)


def problems(message: str) -> list[Problem]:
    """The lines of an error, each with the setting it names."""
    heading, *lines = re.split(r"\n(?=\s*- )", message)
    found = []
    for line in lines:
        match = _LINE.fullmatch(line)
        found.append(Problem(match["path"], match["text"].strip()) if match else Problem("", line.strip(" -")))
    return found or [Problem("", heading)]


def job_rows(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the jobs table as entries of `jobs`; empty cells are left to the top level."""
    return [
        {"name": str(row.get("name") or f"job{number}"), **entry({k: v for k, v in row.items() if k != "name"})}
        for number, row in enumerate(jobs, start=1)
    ]
