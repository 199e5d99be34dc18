"""From a file and `key=value` words to a `RunConfig`.

    file (YAML or JSON) -> dict -> overrides -> paths -> RunConfig

YAML is read by its 1.2 rules for plain values: `1e-4` is a number, `no` is a text, `1:30` is a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowrank.config.jobs import SHORT_FORMS, spell_out
from lowrank.config.paths import locate_paths
from lowrank.config.problems import plain_words
from lowrank.config.schema import RunConfig
from lowrank.errors import ConfigError, did_you_mean, raise_all


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a native YAML or JSON file, with `optimizer.learning_rate=1e-4` words over it.

    Raises `ConfigError` with every problem there is, each with its place.
    """
    path = Path(path)
    return resolve(override(read_file(path), overrides), folder=path.parent, source=str(path))


def resolve(settings: Mapping[str, Any], folder: Path | None = None, source: str = "the settings") -> RunConfig:
    """A `RunConfig` of plain settings, as a native file has them.

    With a `folder`, paths that do not exist as they stand are looked for there too. `source` is what
    error messages call the settings.
    """
    settings, problems = spell_out(settings), []
    if folder is not None:
        settings, problems = locate_paths(settings, folder)
    config = None
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        problems += plain_words(error, settings)
    raise_all(ConfigError, f"{source} cannot be used:", problems)
    assert config is not None
    return config


def read_file(path: Path) -> dict[str, Any]:
    """The top-level mapping of a YAML or JSON file. Raises `ConfigError`, with line and column if it is malformed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    content = _parse_json(path, text) if path.suffix == ".json" else _parse_yaml(path, text)
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: expected settings (key: value), found {found}")
    return content


def override(settings: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The settings with `a.b=value` words over them; values are read as YAML. The given settings are left alone.

    Entries of lists are named by place, those of `jobs` also by name: `jobs.r8.adapter.rank=8`.
    """
    result: Any = spell_out(settings) if words else dict(settings)
    problems: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(f"{word!r}: expected key=value, for example optimizer.learning_rate=1e-4")
            continue
        try:
            result = _with(result, key.split("."), parse_value(text), ())
        except ConfigError as error:
            problems.append(f"{word}: {error}")
    raise_all(ConfigError, "The command line cannot be used:", problems)
    return result


def parse_value(text: str) -> Any:
    """What a YAML file would make of `text`; plain text with a colon in it stays text."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} cannot be read as a value; put it in quotes") from error
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _with(settings: Any, keys: Sequence[str], value: Any, above: tuple[str, ...]) -> Any:
    if not keys:
        return value
    key, *rest = keys
    here = ".".join(above)
    if isinstance(settings, (list, tuple)):
        place = _place_in_list(settings, key, here)
        return [_with(item, rest, value, (*above, key)) if n == place else item for n, item in enumerate(settings)]
    if settings is None:
        settings = {}
    if isinstance(settings, str) and len(above) == 1 and above[0] in SHORT_FORMS:
        settings = {SHORT_FORMS[above[0]]: settings}
    if not isinstance(settings, dict):
        raise ConfigError(f"{here} is {settings!r}, not a group of settings")
    if key == "jobs" and not above and rest and not settings.get("jobs"):
        raise ConfigError("there is no list of jobs; leave out 'jobs' to change the one job")
    return {**settings, key: _with(settings.get(key), rest, value, (*above, key))}


def _place_in_list(items: Sequence[Any], key: str, here: str) -> int:
    names = {str(item["name"]): n for n, item in enumerate(items) if isinstance(item, dict) and "name" in item}
    if key in names:
        return names[key]
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    hint = did_you_mean(key, names) if names else ""
    raise ConfigError(f"{here} has {len(items)} entries, none of them is {key!r}{hint}")


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ConfigError(f"the key {key!r} is given twice in one group")
        content[key] = value
    return content


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's plain values and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (filled below, once)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice in one group", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_PLAIN_VALUES = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _PLAIN_VALUES.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
